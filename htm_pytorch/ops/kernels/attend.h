// Attend inside the picked chunks, and the way back to probes, weights and steps.

#pragma once

#include "call.h"
#include "products.h"

namespace {

// Softmax over `count` of each row, the lanes behind them used as room; then scaled.
template <class T>
void softmax(T* logits, int64_t rows, int64_t stride, int64_t count, T scale) {
    const T lowest = static_cast<T>(-__builtin_inf());
    for (int64_t r = 0; r < rows; ++r) {
        T* row = logits + r * stride;
        int64_t end = count;
        for (; end % lanes<T>; ++end) row[end] = lowest;
        Vector<T> most = load<T>(row);
        for (int64_t c = lanes<T>; c < end; c += lanes<T>) {
            most = larger<T>(most, load<T>(row + c));
        }
        const T top = largest<T>(most);
        Vector<T> total = {};
        for (int64_t c = 0; c < end; c += lanes<T>) {
            const Vector<T> value = exponential<T>(load<T>(row + c) - top);
            total += value;
            store(row + c, value);
        }
        const T factor = scale / sum<T>(total);
        for (int64_t c = 0; c < end; c += lanes<T>) store(row + c, load<T>(row + c) * factor);
    }
}

template <class T>
inline T dot(const T* a, const T* b, int64_t count) {
    Vector<T> total = {};
    int64_t c = 0;
    for (; c + lanes<T> <= count; c += lanes<T>) total += load<T>(a + c) * load<T>(b + c);
    if (c < count) total += load<T>(a + c, count - c) * load<T>(b + c, count - c);
    return sum<T>(total);
}

// to[number[c]] += from[c], or the other way round: a whole chunk is in order.
template <class T>
inline void scatter_add(T* to, const T* from, const int32_t* number, int64_t count, int64_t whole) {
    if (count == whole) {
        for (int64_t c = 0; c < count; ++c) to[c] += from[c];
    } else {
        for (int64_t c = 0; c < count; ++c) to[number[c]] += from[c];
    }
}

template <class T>
inline void gather_add(T* to, const T* from, const int32_t* number, int64_t count, int64_t whole) {
    if (count == whole) {
        for (int64_t c = 0; c < count; ++c) to[c] += from[c];
    } else {
        for (int64_t c = 0; c < count; ++c) to[c] += from[number[c]];
    }
}

template <class T, class S>
void attend(Call& call) {
    const int64_t C = call.chunk_size, W = call.width, H = call.heads, k = call.k;
    const int64_t stride = padded(C), query = call.groups * H * W;
    const auto apart = static_cast<const S*>(call.values) - static_cast<const S*>(call.keys);
    parallel(call, call.batch * call.queries, [&](int64_t begin, int64_t end) {
        Scratch<const S*> rows(stride);
        Scratch<const T*> places(stride);
        Scratch<int32_t> number(stride);
        Scratch<T> logits(H * stride), by_position(2 * H * stride);
        if (!got(call, rows, places, number, logits, by_position)) return;
        T* at_position = by_position + H * stride;
        for (int64_t c = 0; c < C; ++c) {
            places[c] = static_cast<const T*>(call.positions) + c * W;
        }
        for (int64_t x = begin; x < end; ++x) {
            const int64_t row = call.memory_batch == 1 ? 0 : x / call.queries;
            const T* probe = static_cast<const T*>(call.probe) + x * query;
            T* context = static_cast<T*>(call.context) + x * query;
            memset(context, 0, query * sizeof(T));
            if (call.positions) {
                products<T, T>(probe, W, H, places, 0, C, W, by_position, stride);
                memset(at_position, 0, H * stride * sizeof(T));
            }
            for (int64_t j = 0; j < k; ++j) {
                const int64_t m = call.picked[x * k + j];
                if (m < 0) continue;
                const T weight = static_cast<const T*>(call.weights)[x * k + j];
                const int64_t count = steps_of<S>(call, row, m, rows, number);
                for (int64_t g = 0; count && g < call.groups; ++g) {
                    const int64_t offset = g * call.rows_by_group;
                    products<T, S>(probe + g * H * W, W, H, rows, offset, count, W, logits, stride);
                    for (int64_t h = 0; call.positions && h < H; ++h) {
                        gather_add(logits + h * stride, by_position + h * stride, number, count, C);
                    }
                    softmax<T>(logits, H, stride, count, weight);
                    for (int64_t h = 0; call.positions && h < H; ++h) {
                        scatter_add(at_position + h * stride, logits + h * stride, number, count, C);
                    }
                    combine<T, S>(context + g * H * W, W, H, logits, stride, 1, rows,
                                  offset + apart, count, W);
                }
            }
            if (call.positions) {
                combine<T, T>(context, W, H, at_position, stride, 1, places, 0, C, W);
            }
        }
    });
}

template <class T, class S>
void attend_backward(Call& call) {
    const int64_t C = call.chunk_size, W = call.width, H = call.heads, k = call.k;
    const int64_t stride = padded(C), query = call.groups * H * W;
    const auto apart = static_cast<const S*>(call.values) - static_cast<const S*>(call.keys);
    const int64_t tile = H * stride;
    parallel(call, call.last - call.first, [&](int64_t begin, int64_t end) {
        Scratch<const S*> rows(stride);
        Scratch<const T*> places(stride);
        Scratch<int32_t> number(stride);
        Scratch<T> room(6 * tile);
        if (!got(call, rows, places, number, room)) return;
        T *inside = room, *gained = room + tile, *probe_at = room + 2 * tile;
        T *grad_at = room + 3 * tile, *earned = room + 4 * tile, *attended = room + 5 * tile;
        for (int64_t c = 0; c < C; ++c) {
            places[c] = static_cast<const T*>(call.positions) + c * W;
        }
        for (int64_t x = call.first + begin; x < call.first + end; ++x) {
            const int64_t row = call.memory_batch == 1 ? 0 : x / call.queries;
            const T* probe = static_cast<const T*>(call.probe) + x * query;
            const T* grad = static_cast<const T*>(call.grad) + x * query;
            T* grad_probe = static_cast<T*>(call.grad_probe) + x * query;
            memset(grad_probe, 0, query * sizeof(T));
            if (call.positions) {
                products<T, T>(probe, W, H, places, 0, C, W, probe_at, stride);
                products<T, T>(grad, W, H, places, 0, C, W, grad_at, stride);
                memset(earned, 0, 2 * tile * sizeof(T));
            }
            for (int64_t j = 0; j < k; ++j) {
                const int64_t pair = x * k + j, m = call.picked[pair];
                const int64_t saved = (pair - call.first * k) * call.groups * H * C;
                if (call.block_logits) {
                    const int64_t bytes = call.groups * H * C * sizeof(T);
                    memset(static_cast<T*>(call.block_logits) + saved, 0, bytes);
                    memset(static_cast<T*>(call.block_weights) + saved, 0, bytes);
                }
                static_cast<T*>(call.grad_weights)[pair] = 0;
                if (m < 0) continue;
                const T weight = static_cast<const T*>(call.weights)[pair];
                const int64_t count = steps_of<S>(call, row, m, rows, number);
                T grad_weight = 0;
                for (int64_t g = 0; count && g < call.groups; ++g) {
                    const int64_t offset = g * call.rows_by_group, from = g * H * W;
                    products<T, S>(probe + from, W, H, rows, offset, count, W, inside, stride);
                    products<T, S>(grad + from, W, H, rows, offset + apart, count, W, gained,
                                   stride);
                    for (int64_t h = 0; call.positions && h < H; ++h) {
                        gather_add(inside + h * stride, probe_at + h * stride, number, count, C);
                        gather_add(gained + h * stride, grad_at + h * stride, number, count, C);
                    }
                    softmax<T>(inside, H, stride, count, 1);
                    for (int64_t h = 0; h < H; ++h) {
                        T *a = inside + h * stride, *b = gained + h * stride;
                        const T total = dot(a, b, count);
                        grad_weight += total;
                        for (int64_t c = 0; c < count; ++c) {
                            b[c] = weight * a[c] * (b[c] - total);
                            a[c] *= weight;
                        }
                        if (call.positions) {
                            scatter_add(earned + h * stride, b, number, count, C);
                            scatter_add(attended + h * stride, a, number, count, C);
                        }
                        const int64_t at = saved + (g * H + h) * C;
                        for (int64_t c = 0; call.block_logits && c < count; ++c) {
                            static_cast<T*>(call.block_logits)[at + number[c]] = b[c];
                            static_cast<T*>(call.block_weights)[at + number[c]] = a[c];
                        }
                    }
                    combine<T, S>(grad_probe + from, W, H, gained, stride, 1, rows, offset, count,
                                  W);
                }
                static_cast<T*>(call.grad_weights)[pair] = grad_weight;
            }
            if (call.positions) {
                combine<T, T>(grad_probe, W, H, earned, stride, 1, places, 0, C, W);
            }
            for (int64_t h = 0; call.position_logits && h < H; ++h) {
                const int64_t to = (x * H + h) * C;
                memcpy(static_cast<T*>(call.position_logits) + to, earned + h * stride,
                       C * sizeof(T));
                memcpy(static_cast<T*>(call.position_weights) + to, attended + h * stride,
                       C * sizeof(T));
            }
        }
    });
}

template <class T>
void attend_backward_steps(Call& call) {
    const int64_t C = call.chunk_size, W = call.width, H = call.heads, k = call.k;
    sort_pairs(call);
    parallel(call, call.memory_batch * call.chunks, [&](int64_t begin, int64_t end) {
        Scratch<const T*> terms(H);
        if (!got(call, terms)) return;
        for (int64_t slot = begin; slot < end; ++slot) {
            const int64_t row = slot / call.chunks, m = slot % call.chunks;
            const int64_t from = m ? 0 : call.missing;
            const int64_t chunk = row * call.grad_by_batch + (m * C + from) * call.grad_by_step;
            for (int64_t i = call.starts[slot]; i < call.starts[slot + 1]; ++i) {
                const int64_t x = call.pairs[i] / k;
                const int64_t saved = (call.pairs[i] - call.first * k) * call.groups * H * C;
                for (int64_t g = 0; g < call.groups; ++g) {
                    const int64_t head = (x * call.groups + g) * H * W;
                    const int64_t out = chunk + g * call.grad_by_group;
                    const int64_t at = saved + g * H * C + from;
                    auto add = [&](void* to, const void* weights, const void* side) {
                        for (int64_t h = 0; h < H; ++h) {
                            terms[h] = static_cast<const T*>(side) + head + h * W;
                        }
                        combine<T, T>(static_cast<T*>(to) + out, call.grad_by_step, C - from,
                                      static_cast<const T*>(weights) + at, 1, C, terms, 0, H, W);
                    };
                    add(call.grad_keys, call.block_logits, call.probe);
                    add(call.grad_values, call.block_weights, call.grad);
                }
            }
        }
    });
}

}  // namespace
