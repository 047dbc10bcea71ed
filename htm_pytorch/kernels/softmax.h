// Softmax inside a chunk, and its way back.

#pragma once

#include "vectors.h"

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

// From the weights `a` and the gradients `b` of what they weigh, times `scale`: `b` becomes the
// gradients of the logits, `a` the scaled weights. Returns the gradient of the scale.
template <class T>
inline T softmax_backward(T* a, T* b, int64_t count, T scale) {
    const T total = dot(a, b, count);
    for (int64_t c = 0; c < count; ++c) {
        b[c] = scale * a[c] * (b[c] - total);
        a[c] *= scale;
    }
    return total;
}

}  // namespace
