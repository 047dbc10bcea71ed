// Vectors as wide as a register of the processor that is compiled for, and what torch stores.

#pragma once

#include <stdint.h>
#include <string.h>

namespace {

#if defined(__AVX512F__)
constexpr int kRegisterBytes = 64;
constexpr int kRegisters = 32;
#elif defined(__AVX2__)
constexpr int kRegisterBytes = 32;
constexpr int kRegisters = 16;
#else
constexpr int kRegisterBytes = 16;
constexpr int kRegisters = 32;
#endif

constexpr int64_t kPageBytes = 4096;
constexpr int64_t kLineBytes = 64;

struct BFloat16 {
    uint16_t bits;
};
using Float16 = _Float16;

template <class A, class B>
constexpr bool same = false;
template <class A>
constexpr bool same<A, A> = true;

template <class T>
constexpr int lanes = kRegisterBytes / sizeof(T);
template <class T>
using Vector __attribute__((vector_size(kRegisterBytes))) = T;
template <class T>
struct Whole {
    using type = int64_t;
};
template <>
struct Whole<float> {
    using type = int32_t;
};
template <class T>
using Mask = Vector<typename Whole<T>::type>;

template <class T, int n>
struct Packed {
    typedef T type __attribute__((vector_size(n * sizeof(T))));
};

template <class T>
inline Vector<T> splat(T value) {
    return value - Vector<T>{};
}

template <class T, class S>
inline Vector<T> load(const S* from) {
    constexpr int n = lanes<T>;
    if constexpr (same<S, BFloat16>) {
        typename Packed<uint16_t, n>::type half;
        memcpy(&half, from, sizeof half);
        auto word = __builtin_convertvector(half, typename Packed<uint32_t, n>::type) << 16;
        typename Packed<float, n>::type single;
        memcpy(&single, &word, sizeof single);
        return __builtin_convertvector(single, Vector<T>);
    } else {
        typename Packed<S, n>::type stored;
        memcpy(&stored, from, sizeof stored);
        if constexpr (same<S, T>) {
            return stored;
        } else {
            return __builtin_convertvector(stored, Vector<T>);
        }
    }
}

// The first `count` lanes, zeros behind them.
template <class T, class S>
inline Vector<T> load(const S* from, int64_t count) {
    S some[lanes<T>] = {};
    memcpy(some, from, count * sizeof(S));
    return load<T>(some);
}

template <class T>
inline void store(T* to, Vector<T> value) {
    memcpy(to, &value, sizeof value);
}

template <class T>
inline void store(T* to, Vector<T> value, int64_t count) {
    memcpy(to, &value, count * sizeof(T));
}

template <int... i>
struct Indices {};
template <class, int... i>
using MakeIndices = Indices<i...>;
template <int n>
using Count = __make_integer_seq<MakeIndices, int, n>;

// Of blocks of 2 * half lanes: the folded halves of x, then those of y.
template <int half, class V, int... i>
inline V fold(V x, V y, Indices<i...>) {
    constexpr int n = sizeof...(i);
    V low = __builtin_shufflevector(x, y, ((i / half % 2 ? n : 0) + i - i % (2 * half) + i % half)...);
    V high = __builtin_shufflevector(
        x, y, ((i / half % 2 ? n : 0) + i - i % (2 * half) + i % half + half)...);
    return low + high;
}

// Lane i of the result is the sum of the lanes of parts[i].
template <class T, int half = lanes<T> / 2>
inline Vector<T> sums(Vector<T>* parts) {
#pragma unroll
    for (int i = 0; i < half; ++i) {
        parts[i] = fold<half>(parts[i], parts[i + half], Count<lanes<T>>{});
    }
    if constexpr (half > 1) {
        return sums<T, half / 2>(parts);
    } else {
        return parts[0];
    }
}

template <class T>
inline Vector<T> choose(Mask<T> mask, Vector<T> yes, Vector<T> no) {
    return mask ? yes : no;
}

// Of two rows of blocks of `by` x `by`: those above the diagonal and below it change places.
template <int by, class V, int... i>
inline void exchange(V& x, V& y, Indices<i...>) {
    constexpr int n = sizeof...(i);
    V first = __builtin_shufflevector(x, y, (i & by ? n + i - by : i)...);
    y = __builtin_shufflevector(x, y, (i & by ? n + i : i + by)...);
    x = first;
}

// Lane i of parts[j] becomes lane j of parts[i].
template <class T, int by = lanes<T> / 2>
inline void transpose(Vector<T>* parts) {
#pragma unroll
    for (int i = 0; i < lanes<T>; ++i) {
        if (!(i & by)) exchange<by>(parts[i], parts[i + by], Count<lanes<T>>{});
    }
    if constexpr (by > 1) transpose<T, by / 2>(parts);
}

// One number from all lanes, by halves.
template <int by, class V, int... i>
inline V rotated(V value, Indices<i...>) {
    return __builtin_shufflevector(value, value, (i + by) % int(sizeof...(i))...);
}

template <class T, int by = lanes<T> / 2>
inline T sum(Vector<T> value) {
    value += rotated<by>(value, Count<lanes<T>>{});
    if constexpr (by > 1) {
        return sum<T, by / 2>(value);
    } else {
        return value[0];
    }
}

// Written so that NaN stays.
template <class T>
inline Vector<T> larger(Vector<T> a, Vector<T> b) {
    return choose<T>((a <= b) | (b != b), b, a);
}

template <class T, int by = lanes<T> / 2>
inline T largest(Vector<T> value) {
    value = larger<T>(value, rotated<by>(value, Count<lanes<T>>{}));
    if constexpr (by > 1) {
        return largest<T, by / 2>(value);
    } else {
        return value[0];
    }
}

// exp, within two units in the last place; 0 where it would not be a normal number.
template <class T>
inline Vector<T> exponential(Vector<T> x) {
    constexpr bool single = sizeof(T) == 4;
    constexpr int terms = single ? 7 : 13;
    const Vector<T> lowest = splat<T>(single ? T(-87.3) : T(-708.3));
    const Mask<T> tiny = x < lowest;
    x = choose<T>(tiny, lowest, x);
    // Adding this rounds to a whole number, whose bits are then the low ones.
    const Vector<T> shift = splat<T>(single ? T(12582912.0) : T(6755399441055744.0));
    Vector<T> shifted = x * T(1.4426950408889634) + shift;
    Vector<T> whole = shifted - shift;
    x = x - whole * (single ? T(0.693145751953125) : T(0.69314718036912381649));
    x = x - whole * (single ? T(1.42860682030941723e-6) : T(1.9082149292705877e-10));
    T inverse[terms + 1] = {1};
    for (int i = 1; i <= terms; ++i) inverse[i] = inverse[i - 1] / i;
    Vector<T> value = splat<T>(inverse[terms]);
#pragma unroll
    for (int i = terms - 1; i >= 0; --i) value = value * x + inverse[i];
    Mask<T> bits, power;
    memcpy(&bits, &value, sizeof bits);
    memcpy(&power, &shifted, sizeof power);
    bits += power << (single ? 23 : 52);
    Vector<T> scaled;
    memcpy(&scaled, &bits, sizeof scaled);
    // NaN must stay NaN: its exponent is not to be counted up.
    scaled = choose<T>(x == x, scaled, x);
    return choose<T>(tiny, Vector<T>{}, scaled);
}

// log(1 + z) for z from 0 to 1, as twice the inverse hyperbolic tangent of z / (2 + z).
template <class T>
inline Vector<T> log_of_one_and(Vector<T> z) {
    constexpr int terms = sizeof(T) == 4 ? 8 : 17;
    const Vector<T> ratio = z / (z + T(2)), square = ratio * ratio;
    Vector<T> value = splat<T>(T(1) / (2 * terms + 1));
#pragma unroll
    for (int i = terms - 1; i >= 0; --i) value = value * square + T(1) / (2 * i + 1);
    return T(2) * ratio * value;
}

}  // namespace
