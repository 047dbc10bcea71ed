// Attention over the newest steps, and its way back: tiles of a few queries and the keys in their
// reach, of one head at a time.

#pragma once

#include "call.h"
#include "softmax.h"

extern "C" {

// Queries, keys and values of a step lie side by side, T [3, H, E].
#define WINDOW_FIELDS(_)                                                                        \
    _(Parallel*, parallel)                                                                      \
    _(int64_t, threads)                                                                         \
    _(int64_t, batch)                                                                           \
    _(int64_t, length)                                                                          \
    _(int64_t, heads)                                                                           \
    _(int64_t, width)                                                                           \
    _(int64_t, window) /* steps that a query sees, its own included */                          \
    _(const void*, projected) /* T [B, T, 3, H, E] */                                           \
    _(const void*, keys) /* T [B, window - 1, H, E], of the steps before, newest last */        \
    _(const void*, values)                                                                      \
    _(const void*, bias) /* T [H, window], of each distance */                                  \
    _(const int64_t*, oldest) /* [B, T], the oldest step each one sees; negative: before */     \
    _(int64_t, oldest_by_batch)                                                                 \
    _(int64_t, oldest_by_step)                                                                  \
    _(void*, attended) /* T [B, T, H, E] */                                                     \
    _(const void*, grad) /* T, as attended */                                                   \
    _(void*, grad_projected)                                                                    \
    _(void*, grad_bias) /* T [B, H, window] */                                                  \
    _(int32_t, failed)

struct Window {
    WINDOW_FIELDS(MEMBER)
};
}

namespace {

constexpr int64_t kTile = 8;  // queries

// One head of a row of the batch: where its numbers lie, and a tile of its queries.
template <class T>
struct Tile {
    const Window& call;
    const int64_t row, head, past, stride;
    const T *projected, *keys, *values, *bias;
    // Of the queries from `first` on, `count` of them, and of all keys that any of them sees, which
    // are numbered from the step `from` on, `seen` of them.
    int64_t first = 0, count = 0, from = 0, seen = 0;

    Tile(const Window& call, int64_t number)
        : call(call),
          row(number / call.heads),
          head(number % call.heads),
          past(call.window - 1),
          stride(room_for(call)),
          projected(static_cast<const T*>(call.projected) + row * call.length * 3 * inner() +
                    head * call.width),
          keys(static_cast<const T*>(call.keys) + row * past * inner() + head * call.width),
          values(static_cast<const T*>(call.values) + row * past * inner() + head * call.width),
          bias(static_cast<const T*>(call.bias) + head * call.window) {}

    // A softmax over part of a row takes whole vectors.
    static int64_t room_for(const Window& call) { return padded(kTile + call.window + lanes<T>); }

    int64_t inner() const { return call.heads * call.width; }

    // The place of a step among what goes in or comes out as T [B, T, H, E].
    int64_t at(int64_t step) const {
        return (row * call.length + step) * inner() + head * call.width;
    }

    int64_t oldest(int64_t step) const {
        const int64_t said =
            call.oldest[row * call.oldest_by_batch + step * call.oldest_by_step];
        const int64_t least = step - past;
        return said < least ? least : said <= step ? said : step + 1;
    }

    void begin(int64_t step) {
        first = step;
        count = call.length - step < kTile ? call.length - step : kTile;
        from = step;
        for (int64_t r = 0; r < count; ++r) {
            const int64_t other = oldest(step + r);
            from = other < from ? other : from;
        }
        seen = first + count - from;
    }

    // Part 1 are the keys, part 2 the values.
    void point(int64_t part, const T** rows) const {
        const T* before = part == 1 ? keys : values;
        for (int64_t c = 0; c < seen; ++c) {
            const int64_t step = from + c;
            rows[c] = step < 0 ? before + (step + past) * inner()
                               : projected + (step * 3 + part) * inner();
        }
    }

    // The first of the keys that query r sees; its last is its own step, `own`.
    int64_t begin_of(int64_t r) const { return oldest(first + r) - from; }
    int64_t own(int64_t r) const { return first + r - from; }

    void collect(const T* source, int64_t apart, T scale, T* to) const {
        for (int64_t r = 0; r < count; ++r) {
            for (int64_t d = 0; d < call.width; ++d) to[r * call.width + d] = source[r * apart + d] * scale;
        }
    }

    T scale() const { return 1 / __builtin_sqrt(static_cast<double>(call.width)); }

    // The weights [count, seen] of the keys, those that a query does not see being 0.
    void weigh(const T* queries, const T** rows, T* weights) const {
        products<T, T>(queries, call.width, count, rows, seen, call.width, weights, stride);
        for (int64_t r = 0; r < count; ++r) {
            T* row = weights + r * stride;
            int64_t begin = begin_of(r);
            const int64_t end = own(r) + 1;
            bool is_any = false;
            for (int64_t c = begin; c < end; ++c) {
                row[c] += bias[end - 1 - c];
                is_any |= row[c] != -__builtin_inf();
            }
            if (is_any) {
                softmax<T>(row + begin, 1, stride, end - begin, 1);
            } else {
                begin = end;
            }
            for (int64_t c = 0; c < begin; ++c) row[c] = 0;
            for (int64_t c = end; c < seen; ++c) row[c] = 0;
        }
    }
};

// Whether all rows are finite.
template <class T>
bool are_finite(const T* const* rows, int64_t count, int64_t width) {
    Vector<T> total = {};
    for (int64_t c = 0; c < count; ++c) {
        int64_t d = 0;
        for (; d + lanes<T> <= width; d += lanes<T>) total += load<T>(rows[c] + d) * T(0);
        if (d < width) total += load<T>(rows[c] + d, width - d) * T(0);
    }
    return sum<T>(total) == 0;
}

// A value that is not finite makes those that see it NaN, and no other: 0 times it is not 0.
template <class T>
void mix_apart(const Tile<T>& tile, const T* weights, const T** rows, T* out, int64_t apart) {
    const int64_t width = tile.call.width;
    for (int64_t r = 0; r < tile.count; ++r) {
        const int64_t begin = tile.begin_of(r), count = tile.own(r) + 1 - begin;
        if (are_finite<T>(rows + begin, count, width)) {
            combine<T, T>(out + r * apart, 0, 1, weights + r * tile.stride + begin, 0, 1,
                          rows + begin, 0, count, width);
        } else {
            for (int64_t d = 0; d < width; ++d) out[r * apart + d] = __builtin_nan("");
        }
    }
}

template <class T>
void attend_window(Window& call) {
    const int64_t E = call.width, inner = call.heads * E;
    in_parallel(call.parallel, call.threads, call.batch * call.heads, [&](int64_t begin, int64_t end) {
        const int64_t stride = Tile<T>::room_for(call);
        Scratch<const T*> rows(stride);
        Scratch<T> queries(kTile * E), weights(kTile * stride);
        if (!got(call, rows, queries, weights)) return;
        for (int64_t number = begin; number < end; ++number) {
            Tile<T> tile(call, number);
            for (int64_t step = 0; step < call.length; step += kTile) {
                tile.begin(step);
                tile.collect(tile.projected + step * 3 * inner, 3 * inner, tile.scale(), queries);
                tile.point(1, rows);
                tile.weigh(queries, rows, weights);
                tile.point(2, rows);
                T* out = static_cast<T*>(call.attended) + tile.at(step);
                for (int64_t r = 0; r < tile.count; ++r) memset(out + r * inner, 0, E * sizeof(T));
                if (are_finite<T>(rows, tile.seen, E)) {
                    combine<T, T>(out, inner, tile.count, weights, stride, 1, rows, 0, tile.seen, E);
                } else {
                    mix_apart<T>(tile, weights, rows, out, inner);
                }
            }
        }
    });
}

template <class T>
void attend_window_backward(Window& call) {
    const int64_t E = call.width, inner = call.heads * E;
    in_parallel(call.parallel, call.threads, call.batch * call.heads, [&](int64_t begin, int64_t end) {
        const int64_t stride = Tile<T>::room_for(call);
        Scratch<const T*> keys(stride), values(stride), of_queries(kTile), of_grads(kTile);
        Scratch<T> queries(kTile * E), grads(kTile * E), weights(kTile * stride);
        Scratch<T> gained(kTile * stride);
        if (!got(call, keys, values, of_queries, of_grads, queries, grads, weights, gained)) return;
        for (int64_t r = 0; r < kTile; ++r) {
            of_queries[r] = queries + r * E;
            of_grads[r] = grads + r * E;
        }
        for (int64_t number = begin; number < end; ++number) {
            Tile<T> tile(call, number);
            T* to = static_cast<T*>(call.grad_projected) + (tile.projected - static_cast<const T*>(call.projected));
            T* to_bias = static_cast<T*>(call.grad_bias) + number * call.window;
            memset(to_bias, 0, call.window * sizeof(T));
            for (int64_t i = 0; i < 3 * call.length; ++i) memset(to + i * inner, 0, E * sizeof(T));
            for (int64_t step = 0; step < call.length; step += kTile) {
                tile.begin(step);
                tile.collect(tile.projected + step * 3 * inner, 3 * inner, tile.scale(), queries);
                tile.collect(static_cast<const T*>(call.grad) + tile.at(step), inner, 1, grads);
                tile.point(1, keys);
                tile.point(2, values);
                tile.weigh(queries, keys, weights);
                products<T, T>(grads, E, tile.count, values, tile.seen, E, gained, stride);
                for (int64_t r = 0; r < tile.count; ++r) {
                    T *a = weights + r * stride, *b = gained + r * stride;
                    softmax_backward(a, b, tile.seen, T(1));
                    const int64_t own = tile.own(r);
                    for (int64_t c = tile.begin_of(r); c <= own; ++c) to_bias[own - c] += b[c];
                }
                T* to_queries = to + step * 3 * inner;
                combine<T, T>(to_queries, 3 * inner, tile.count, gained, stride, 1, keys, 0, tile.seen, E);
                for (int64_t r = 0; r < tile.count; ++r) {
                    for (int64_t d = 0; d < E; ++d) to_queries[r * 3 * inner + d] *= tile.scale();
                }
                // What came before this call gets no gradient.
                const int64_t skip = tile.from < 0 ? -tile.from : 0;
                const int64_t count = tile.seen - skip;
                T* to_keys = to + ((tile.from + skip) * 3 + 1) * inner;
                combine<T, T>(to_keys, 3 * inner, count, gained + skip, 1, stride, of_queries, 0,
                              tile.count, E);
                combine<T, T>(to_keys + inner, 3 * inner, count, weights + skip, 1, stride, of_grads,
                              0, tile.count, E);
            }
        }
    });
}

}  // namespace
