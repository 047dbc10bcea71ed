// The two products that all time goes to: rows times rows, and sums of weighted rows.

#pragma once

#include "vectors.h"

namespace {

// What the products ask for on the way, a line of the cache at each of their innermost steps:
// requests that come all at once wait for each other.
struct Ahead {
    const char *at, *end;
    int64_t by;
    inline void operator()() {
        __builtin_prefetch(at, 0, 2);
        at += at < end ? by : 0;
    }
};
struct Nothing {
    inline void operator()() {}
};

// out[r, c] = left[r] . right[c] for R rows and C rows of `width`, all sums in registers.
template <class T, class S, int R, int C, class Hint>
inline void dots(const T* left, int64_t left_stride, const S* const* right, int64_t width, T* out,
                 int64_t out_stride, int64_t columns, Hint& hint) {
    Hint mine = hint;
    Vector<T> total[R * C] = {};
    auto add = [&](auto... partial) __attribute__((always_inline)) {
        return [&, partial...](int64_t d) __attribute__((always_inline)) {
            Vector<T> rows[R];
#pragma unroll
            for (int r = 0; r < R; ++r) rows[r] = load<T>(left + r * left_stride + d, partial...);
#pragma unroll
            for (int c = 0; c < C; ++c) {
                const Vector<T> column = load<T>(right[c] + d, partial...);
#pragma unroll
                for (int r = 0; r < R; ++r) total[r * C + c] += rows[r] * column;
            }
        };
    };
    int64_t d = 0;
    for (; d + lanes<T> <= width; d += lanes<T>) {
        mine();
        add()(d);
    }
    hint = mine;
    if (d < width) add(width - d)(d);
    T result[R * C];
#pragma unroll
    for (int i = 0; i < R * C; i += lanes<T>) store(result + i, sums<T>(total + i));
    for (int r = 0; r < R; ++r) {
        memcpy(out + r * out_stride, result + r * C, (columns < C ? columns : C) * sizeof(T));
    }
}

// Sums held at once: a whole number of vectors, enough of them to keep the adders busy.
template <class T>
constexpr int held = lanes<T> < 8 ? (kRegisters == 32 ? 16 : 8) : lanes<T>;

// out[r, c] = left[r] . right[c] for r < rows, c < columns. `right` has room for pointers up to the
// next multiple of held<T>, which this fills.
template <class T, class S, class Hint = Nothing>
void products(const T* left, int64_t left_stride, int64_t rows, const S** right, int64_t columns,
              int64_t width, T* out, int64_t out_stride, Hint&& hint = Hint()) {
    for (int64_t c = columns; c % held<T>; ++c) right[c] = right[columns - 1];
    // The rows on the right come from far: all that is on the left meets them while they are near.
    for (int64_t near = 0; near < columns; near += held<T>) {
        auto sweep = [&](auto count, int64_t r) __attribute__((always_inline)) {
            constexpr int R = sizeof(count), C = held<T> / R;
            for (int64_t c = near; c < near + held<T> && c < columns; c += C) {
                dots<T, S, R, C>(left + r * left_stride, left_stride, right + c, width,
                                 out + r * out_stride + c, out_stride, columns - c, hint);
            }
        };
        int64_t r = 0;
        for (; r + 4 <= rows; r += 4) sweep(int32_t(), r);
        if (r + 2 <= rows) sweep(int16_t(), r), r += 2;
        if (r < rows) sweep(int8_t(), r);
    }
}

// out[r, d] += sum_i coefficients[r * by_row + i * by_term] * terms[i][offset + d], for R rows and
// V vectors of d, or for the last few d of a row.
template <class T, class S, int R, int V, class Hint, class... Partial>
inline void mix(T* out, int64_t out_stride, const T* coefficients, int64_t by_row, int64_t by_term,
                const S* const* terms, int64_t offset, int64_t count, Hint& hint,
                Partial... partial) {
    Hint mine = hint;
    Vector<T> total[R][V];
#pragma unroll
    for (int r = 0; r < R; ++r) {
#pragma unroll
        for (int v = 0; v < V; ++v) {
            total[r][v] = load<T>(out + r * out_stride + v * lanes<T>, partial...);
        }
    }
    for (int64_t i = 0; i < count; ++i) {
        mine();
        Vector<T> term[V];
#pragma unroll
        for (int v = 0; v < V; ++v) {
            term[v] = load<T>(terms[i] + offset + v * lanes<T>, partial...);
        }
#pragma unroll
        for (int r = 0; r < R; ++r) {
            const T coefficient = coefficients[r * by_row + i * by_term];
#pragma unroll
            for (int v = 0; v < V; ++v) total[r][v] += coefficient * term[v];
        }
    }
    hint = mine;
#pragma unroll
    for (int r = 0; r < R; ++r) {
#pragma unroll
        for (int v = 0; v < V; ++v) {
            store(out + r * out_stride + v * lanes<T>, total[r][v], partial...);
        }
    }
}

template <class T, class S, int V, class Hint, class... Partial>
inline void mix_rows(T* out, int64_t out_stride, int64_t rows, const T* coefficients,
                     int64_t by_row, int64_t by_term, const S* const* terms, int64_t offset,
                     int64_t count, Hint& hint, Partial... partial) {
    int64_t r = 0;
    auto sweep = [&](auto number) __attribute__((always_inline)) {
        constexpr int R = sizeof(number);
        mix<T, S, R, V>(out + r * out_stride, out_stride, coefficients + r * by_row, by_row,
                        by_term, terms, offset, count, hint, partial...);
        r += R;
    };
    // One vector of four rows would leave the adders waiting for each other.
    while (V == 1 && r + 8 <= rows) sweep(int64_t());
    while (r + 4 <= rows) sweep(int32_t());
    if (r + 2 <= rows) sweep(int16_t());
    if (r < rows) sweep(int8_t());
}

// out[r, d] += sum_i coefficients[r, i] * terms[i][offset + d] for r < rows, d < width.
template <class T, class S, class Hint = Nothing>
void combine(T* out, int64_t out_stride, int64_t rows, const T* coefficients, int64_t by_row,
             int64_t by_term, const S* const* terms, int64_t offset, int64_t count,
             int64_t width, Hint&& hint = Hint()) {
    constexpr int V = kRegisters == 32 ? 4 : 2;
    int64_t d = 0;
    auto sweep = [&](auto many, auto... partial) __attribute__((always_inline)) {
        mix_rows<T, S, sizeof(many)>(out + d, out_stride, rows, coefficients, by_row, by_term,
                                     terms, offset + d, count, hint, partial...);
        d += sizeof(many) * lanes<T>;
    };
    while (d + V * lanes<T> <= width) sweep(typename Packed<char, V>::type());
    while (d + lanes<T> <= width) sweep(char());
    if (d < width) sweep(char(), width - d);
}

// to[d * stride + c] = rows[c][offset + d] for d < width, c < count; zeros up to c < stride.
template <class T, class S>
void turn(const S* const* rows, int64_t offset, int64_t count, int64_t width, T* to,
          int64_t stride) {
    constexpr int n = lanes<T>;
    for (int64_t c = 0; c < stride; c += n) {
        for (int64_t d = 0; d < width; d += n) {
            const int64_t some = width - d < n ? width - d : n;
            Vector<T> part[n];
#pragma unroll
            for (int i = 0; i < n; ++i) {
                if (c + i >= count) {
                    part[i] = Vector<T>{};
                } else if (some == n) {
                    part[i] = load<T>(rows[c + i] + offset + d);
                } else {
                    part[i] = load<T>(rows[c + i] + offset + d, some);
                }
            }
            transpose<T>(part);
            for (int i = 0; i < some; ++i) store(to + (d + i) * stride + c, part[i]);
        }
    }
}

}  // namespace
