// Attend inside the picked chunks, and the way back to probes, weights and steps.

#pragma once

#include "call.h"
#include "products.h"
#include "softmax.h"

namespace {

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

// The rows of one query side by side: heads may lie so far apart that they share cache lines' sets.
template <class T>
void collect(const Heads& heads, int64_t x, int64_t rows, int64_t width, T* to) {
    const T* from = static_cast<const T*>(heads.at) + x * heads.by_query;
    for (int64_t r = 0; r < rows; ++r) {
        memcpy(to + r * width, from + r * heads.by_head, width * sizeof(T));
    }
}

template <class T>
void spread(const T* from, int64_t x, int64_t rows, int64_t width, const Heads& heads) {
    T* to = static_cast<T*>(heads.at) + x * heads.by_query;
    for (int64_t r = 0; r < rows; ++r) {
        memcpy(to + r * heads.by_head, from + r * width, width * sizeof(T));
    }
}

template <class T>
void point_to_positions(const Call& call, const T** places) {
    for (int64_t c = 0; call.positions && c < call.chunk_size; ++c) {
        places[c] = static_cast<const T*>(call.positions) + c * call.width;
    }
}

// The chunk that comes next, for `passes` over the present one to read ahead.
template <class T, class S>
Ahead look_ahead(const Call& call, int64_t pair, int64_t passes) {
    if (pair >= call.batch * call.queries * call.k || call.picked[pair] < 0) return no_look();
    const int64_t row = call.memory_batch == 1 ? 0 : pair / call.k / call.queries;
    const auto* chunk = reinterpret_cast<const char*>(
        static_cast<const S*>(call.rows) + row * call.rows_by_batch +
        call.picked[pair] * call.chunk_size * call.rows_by_step);
    const int64_t size = passes * call.heads * call.chunk_size * call.width;
    return look_ahead<T>(chunk, call.chunk_size, call.rows_by_step * sizeof(S),
                         call.width * sizeof(S), size);
}

template <class T, class S>
void attend(Call& call) {
    if (!picks_exist(call)) return;
    const int64_t C = call.chunk_size, W = call.width, H = call.heads, k = call.k;
    const int64_t stride = padded(C);
    parallel(call, call.batch * call.queries, [&](int64_t begin, int64_t end) {
        Scratch<const S*> rows(stride);
        Scratch<const T*> places(stride);
        Scratch<int32_t> number(stride);
        Scratch<T> logits(H * stride), by_position(2 * H * stride), mine(2 * H * W);
        if (!got(call, rows, places, number, logits, by_position, mine)) return;
        T *probe = mine, *context = mine + H * W, *at_position = by_position + H * stride;
        point_to_positions<T>(call, places);
        for (int64_t x = begin; x < end; ++x) {
            const int64_t row = call.memory_batch == 1 ? 0 : x / call.queries;
            collect(call.probe, x, H, W, probe);
            memset(context, 0, H * W * sizeof(T));
            if (call.positions) {
                products<T, T>(probe, W, H, places, C, W, by_position, stride);
                memset(at_position, 0, H * stride * sizeof(T));
            }
            for (int64_t j = 0; j < k; ++j) {
                const int64_t m = call.picked[x * k + j];
                if (m < 0) continue;
                const T weight = static_cast<const T*>(call.weights)[x * k + j];
                const int64_t count = steps_of<S>(call, row, m, rows, number);
                Ahead ahead = look_ahead<T, S>(call, x * k + j + 1, 2);
                products<T, S>(probe, W, H, rows, count, W, logits, stride, ahead);
                for (int64_t h = 0; call.positions && h < H; ++h) {
                    gather_add(logits + h * stride, by_position + h * stride, number, count, C);
                }
                softmax<T>(logits, H, stride, count, weight);
                for (int64_t h = 0; call.positions && h < H; ++h) {
                    scatter_add(at_position + h * stride, logits + h * stride, number, count, C);
                }
                combine<T, S>(context, W, H, logits, stride, 1, rows, 0, count, W, ahead);
            }
            if (call.positions) {
                combine<T, T>(context, W, H, at_position, stride, 1, places, 0, C, W);
            }
            spread(context, x, H, W, call.context);
        }
    });
}

template <class T, class S>
void attend_backward(Call& call) {
    if (!picks_exist(call)) return;
    const int64_t C = call.chunk_size, W = call.width, H = call.heads, k = call.k;
    const int64_t stride = padded(C), tile = H * stride;
    parallel(call, call.last - call.first, [&](int64_t begin, int64_t end) {
        Scratch<const S*> rows(stride);
        Scratch<const T*> places(stride);
        Scratch<int32_t> number(stride);
        Scratch<T> room(6 * tile), mine(3 * H * W);
        if (!got(call, rows, places, number, room, mine)) return;
        T *inside = room, *gained = room + tile, *probe_at = room + 2 * tile;
        T *grad_at = room + 3 * tile, *earned = room + 4 * tile, *attended = room + 5 * tile;
        T *probe = mine, *grad = mine + H * W, *grad_probe = mine + 2 * H * W;
        point_to_positions<T>(call, places);
        for (int64_t x = call.first + begin; x < call.first + end; ++x) {
            const int64_t row = call.memory_batch == 1 ? 0 : x / call.queries;
            collect(call.probe, x, H, W, probe);
            collect(call.grad, x, H, W, grad);
            memset(grad_probe, 0, H * W * sizeof(T));
            if (call.positions) {
                products<T, T>(probe, W, H, places, C, W, probe_at, stride);
                products<T, T>(grad, W, H, places, C, W, grad_at, stride);
                memset(earned, 0, 2 * tile * sizeof(T));
            }
            for (int64_t j = 0; j < k; ++j) {
                const int64_t pair = x * k + j, m = call.picked[pair];
                T* saved = static_cast<T*>(call.block_weights);
                if (saved) {
                    saved += (pair - call.first * k) * 2 * H * C;
                    memset(saved, 0, 2 * H * C * sizeof(T));
                }
                T grad_weight = 0;
                const T weight = static_cast<const T*>(call.weights)[pair];
                const int64_t count = m < 0 ? 0 : steps_of<S>(call, row, m, rows, number);
                Ahead ahead = look_ahead<T, S>(call, pair + 1, 3);
                products<T, S>(probe, W, H, rows, count, W, inside, stride, ahead);
                products<T, S>(grad, W, H, rows, count, W, gained, stride, ahead);
                for (int64_t h = 0; call.positions && h < H; ++h) {
                    gather_add(inside + h * stride, probe_at + h * stride, number, count, C);
                    gather_add(gained + h * stride, grad_at + h * stride, number, count, C);
                }
                softmax<T>(inside, H, stride, count, 1);
                for (int64_t h = 0; count && h < H; ++h) {
                    T *a = inside + h * stride, *b = gained + h * stride;
                    grad_weight += softmax_backward(a, b, count, weight);
                    if (call.positions) {
                        scatter_add(earned + h * stride, b, number, count, C);
                        scatter_add(attended + h * stride, a, number, count, C);
                    }
                    if (saved) {
                        scatter_add(saved + h * C, b, number, count, C);
                        scatter_add(saved + (H + h) * C, a, number, count, C);
                    }
                }
                combine<T, S>(grad_probe, W, H, gained, stride, 1, rows, 0, count, W);
                static_cast<T*>(call.grad_weights)[pair] = grad_weight;
            }
            if (call.positions) {
                combine<T, T>(grad_probe, W, H, earned, stride, 1, places, 0, C, W);
            }
            spread(grad_probe, x, H, W, call.grad_probe);
            for (int64_t r = 0; call.position_weights && r < 2 * H; ++r) {
                memcpy(static_cast<T*>(call.position_weights) + (x * 2 * H + r) * C,
                       earned + r * stride, C * sizeof(T));
            }
        }
    });
}

template <class T>
void attend_backward_steps(Call& call) {
    const int64_t C = call.chunk_size, W = call.width, H = call.heads, k = call.k;
    sort_pairs(call);
    parallel(call, call.memory_batch * call.chunks, [&](int64_t begin, int64_t end) {
        // What each step gets from the heads: their probes by the logits, their grads by the weights.
        Scratch<const T*> terms(2 * H);
        Scratch<int32_t> number(C);
        if (!got(call, terms, number)) return;
        for (int64_t slot = begin; slot < end; ++slot) {
            const int64_t row = slot / call.chunks, m = slot % call.chunks;
            if (call.starts[slot] == call.starts[slot + 1]) continue;
            T* out = static_cast<T*>(call.grad_rows) + row * call.grad_by_batch +
                     m * C * call.grad_by_step;
            const int64_t there = numbers_of(call, row, m, number);
            for (int64_t i = call.starts[slot]; i < call.starts[slot + 1]; ++i) {
                const int64_t x = call.pairs[i] / k;
                const T* saved = static_cast<const T*>(call.block_weights) +
                                 (call.pairs[i] - call.first * k) * 2 * H * C;
                for (int64_t h = 0; h < H; ++h) {
                    terms[h] = static_cast<const T*>(call.probe.at) + x * call.probe.by_query +
                               h * call.probe.by_head;
                    terms[H + h] = static_cast<const T*>(call.grad.at) + x * call.grad.by_query +
                                   h * call.grad.by_head;
                }
                // Runs of steps that are there: the others get nothing, not even 0 times NaN.
                for (int64_t c = 0; c < there;) {
                    int64_t many = 1;
                    while (c + many < there && number[c + many] == number[c] + many) ++many;
                    combine<T, T>(out + number[c] * call.grad_by_step, call.grad_by_step, many,
                                  saved + number[c], 1, C, terms, 0, 2 * H, W);
                    c += many;
                }
            }
        }
    });
}

}  // namespace
