// Summaries as codes of 8 bits: what can be said of a product with a route from a quarter of the
// bytes, and how they are made. The bound is proved in docs/math.md.

#pragma once

#include "call.h"
#if defined(__x86_64__)
#include <immintrin.h>
#endif

extern "C" {

// Stretches to be coded anew.
#define ENCODING_FIELDS(_)                                         \
    _(Parallel*, parallel)                                         \
    _(int64_t, threads)                                            \
    _(Codes, codes)                                                \
    _(const void*, summaries) /* S [B, M, D] */                    \
    _(int64_t, summaries_by_batch)                                 \
    _(int64_t, summaries_by_chunk)                                 \
    _(int64_t, begin) /* the chunk that the first of them is of */  \
    _(int64_t, chunks) /* that there are, coded ones included */    \
    _(int64_t, dim)                                                \
    /* [count, 4]: row, stretch, the first of its chunks to code, whether it gets a centre. */     \
    _(const int64_t*, stretches)                                   \
    _(int64_t, count)                                              \
    _(int32_t, failed)

struct Encoding {
    ENCODING_FIELDS(MEMBER)
};
}

namespace {

constexpr int64_t kStretch = 64;    // chunks that share a centre
constexpr int kZero = 128, kMost = 127;
constexpr int kFine = 2 * kMost;
// Lengths of which squares are numbers; what is not among them is looked at as it is.
constexpr float kShortest = 1e-30f, kLongest = 1e30f;

struct Terms {
    float scale, error, size, fine;
};

// How much of the lengths of two vectors of `dim` numbers a product of them may be off by.
double rounding_of(int64_t dim) { return (dim / 4 + 16) * 0x1p-24; }

// A sum of squares of small whole numbers or their parts, in lanes.
inline double total_of(Vector<float> lanes_of) {
    double total = 0;
    for (int i = 0; i < lanes<float>; ++i) total += static_cast<double>(lanes_of[i]);
    return total;
}

inline Vector<float> rounded(Vector<float> x) {
    const Vector<float> shift = splat(12582912.0f);
    return (x + shift) - shift;
}

inline Vector<float> magnitude(Vector<float> x) { return choose<float>(x < 0, -x, x); }

// The largest magnitude in a row; NaN where one of its numbers is none.
template <class S>
float largest_of(const S* row, int64_t dim) {
    Vector<float> most = {};
    int64_t d = 0;
    for (; d + lanes<float> <= dim; d += lanes<float>) {
        most = larger<float>(most, magnitude(load<float>(row + d)));
    }
    if (d < dim) most = larger<float>(most, magnitude(load<float>(row + d, dim - d)));
    return largest<float>(most);
}

// Code the rest [W] of a summary, zeros behind its numbers. `far` is the length of its centre.
inline Terms encode_row(const float* rest, int64_t width, int64_t dim, double far, uint8_t* coarse,
                        uint8_t* fine) {
    const float largest_one = largest_of(rest, width);
    if (!(largest_one < kLongest) || !(far < kLongest)) {
        memset(coarse, kZero, width);
        if (fine) memset(fine, kZero, width);
        const float far_off = __builtin_inff();
        return {0, far_off, 0, far_off};
    }
    const bool tiny = largest_one < kShortest;
    const float scale = tiny ? 0 : largest_one / kMost, inverse = tiny ? 0 : kMost / largest_one;
    Vector<float> of_code = {}, of_error = {}, of_fine = {};
    for (int64_t d = 0; d < width; d += lanes<float>) {
        const Vector<float> x = load<float>(rest + d) * inverse, u = rounded(x);
        const Vector<float> left = x - u, v = rounded(left * float(kFine));
        const Vector<float> least = left - v * (1.0f / kFine);
        of_code += u * u;
        of_error += left * left;
        of_fine += least * least;
        const auto whole = __builtin_convertvector(u, Vector<int32_t>) + kZero;
        const auto part = __builtin_convertvector(v, Vector<int32_t>) + kZero;
        const auto bytes = __builtin_convertvector(whole, typename Packed<uint8_t, lanes<float>>::type);
        memcpy(coarse + d, &bytes, sizeof bytes);
        if (fine) {
            const auto more = __builtin_convertvector(part, typename Packed<uint8_t, lanes<float>>::type);
            memcpy(fine + d, &more, sizeof more);
        }
    }
    // Sums of squares are off by less than a thousandth; products by a little of all lengths.
    const double once = scale * 1.001;
    const double size = once * __builtin_sqrt(total_of(of_code));
    const double error = once * __builtin_sqrt(total_of(of_error));
    const double rest_of_fine = once * __builtin_sqrt(total_of(of_fine));
    const double tiny_rest = tiny ? kShortest * __builtin_sqrt(static_cast<double>(dim)) : 0;
    const double always = 2 * rounding_of(dim) * (far + size + error) + tiny_rest;
    return {scale, static_cast<float>(error + always), static_cast<float>(size),
            static_cast<float>(rest_of_fine + always)};
}

inline double length_of(const float* row, int64_t dim) {
    double total = 0;
    for (int64_t d = 0; d < dim; ++d) total += static_cast<double>(row[d]) * row[d];
    return __builtin_sqrt(total);
}

// What the chunks [first, last) have in common: their mean; of few, that of the stretch before,
// which they are likely to go on from.
template <class S>
void find_centre(const Encoding& to, int64_t row, int64_t stretch, const S** rows, float* centre) {
    const int64_t first = stretch * kStretch, dim = to.dim;
    const int64_t last = first + kStretch < to.chunks ? first + kStretch : to.chunks;
    const S* summaries = static_cast<const S*>(to.summaries) + row * to.summaries_by_batch;
    memset(centre, 0, dim * sizeof(float));
    if (stretch && last - first < kStretch / 4) {
        const float* scales = to.codes.scales + row * to.codes.terms_by_batch;
        const uint8_t* coarse = to.codes.coarse + row * to.codes.by_batch;
        for (int64_t m = first - kStretch; m < first; ++m) {
            const float scale = scales[m] / kStretch;
            const uint8_t* code = coarse + m * to.codes.width;
            for (int64_t d = 0; d < dim; ++d) centre[d] += scale * (static_cast<int>(code[d]) - kZero);
        }
        const float* before = centre - dim;
        for (int64_t d = 0; d < dim; ++d) centre[d] += before[d];
        return;
    }
    int64_t count = 0;
    for (int64_t m = first; m < last; ++m) {
        rows[count] = summaries + (m - to.begin) * to.summaries_by_chunk;
        count += largest_of(rows[count], dim) < kLongest;
    }
    const float share = 1.0f / static_cast<float>(count);
    if (count) combine<float, S>(centre, 0, 1, &share, 0, 0, rows, 0, count, dim);
}

template <class S>
void encode_stretch(const Encoding& to, int64_t row, int64_t stretch, int64_t start, bool renew,
                    float* rest, const S** rows) {
    const int64_t first = stretch * kStretch, dim = to.dim, width = to.codes.width;
    const int64_t last = first + kStretch < to.chunks ? first + kStretch : to.chunks;
    float* centre = to.codes.centres + row * to.codes.centres_by_batch + stretch * dim;
    float* radius = to.codes.radii + row * to.codes.radii_by_batch + stretch;
    const S* summaries = static_cast<const S*>(to.summaries) + row * to.summaries_by_batch;
    if (renew) {
        find_centre<S>(to, row, stretch, rows, centre);
        *radius = 0;
    }
    const double far = length_of(centre, dim);
    for (int64_t m = start; m < last; ++m) {
        const S* summary = summaries + (m - to.begin) * to.summaries_by_chunk;
        int64_t d = 0;
        for (; d + lanes<float> <= dim; d += lanes<float>) {
            store(rest + d, load<float>(summary + d) - load<float>(centre + d));
        }
        for (; d < width; d += lanes<float>) {
            const int64_t some = d < dim ? dim - d : 0;
            store(rest + d, load<float>(summary + d, some) - load<float>(centre + d, some));
        }
        const int64_t at = row * to.codes.by_batch + m * width;
        uint8_t* fine = to.codes.fine ? to.codes.fine + at : nullptr;
        const Terms terms = encode_row(rest, width, dim, far, to.codes.coarse + at, fine);
        const int64_t place = row * to.codes.terms_by_batch + m;
        to.codes.scales[place] = terms.scale;
        to.codes.errors[place] = terms.error;
        to.codes.sizes[place] = terms.size;
        if (fine) to.codes.fine_errors[place] = terms.fine;
        const float distance = (terms.size + terms.error) * (1 + 0x1p-20f);
        if (!(distance <= *radius)) *radius = distance;
    }
}

template <class S>
void encode(Encoding& to) {
    // A stretch of few chunks asks for the codes of the one before it.
    auto is_few = [&](const int64_t* one) {
        return one[3] && one[1] && to.chunks - one[1] * kStretch < kStretch / 4;
    };
    auto code = [&](int64_t begin, int64_t end, bool few) {
        Scratch<float> rest(to.codes.width);
        Scratch<const S*> rows(kStretch);
        if (!rest.at || !rows.at) {
            to.failed = kNoMemory;
            return;
        }
        for (int64_t i = begin; i < end; ++i) {
            const int64_t* one = to.stretches + 4 * i;
            if (is_few(one) == few) encode_stretch<S>(to, one[0], one[1], one[2], one[3], rest, rows);
        }
    };
    in_parallel(to.parallel, to.threads, to.count, [&](int64_t begin, int64_t end) {
        code(begin, end, false);
    });
    in_parallel(to.parallel, 1, to.count, [&](int64_t begin, int64_t end) {
        code(begin, end, true);
    });
}

// A route as a code.
struct Asked {
    float step;          // it is about step x code
    float length, rest;  // of it, and of what the code leaves; no less
    int32_t zero;        // what kZero adds to a product of codes
    float lost;          // of products so small that they count as 0; no less
};

#if defined(__x86_64__)
#if defined(__AVX512BW__)
using Bytes = __m512i;
#define LOAD_BYTES(at) _mm512_loadu_si512(at)
#define NO_BYTES _mm512_setzero_si512()
// Sums of two products of 8 bits in 16, which only a route of 7 bits leaves room for.
#define ADD_PRODUCTS(to, code, asked) \
    _mm512_add_epi32(to, _mm512_madd_epi16(_mm512_maddubs_epi16(code, asked), _mm512_set1_epi16(1)))
#else
using Bytes = __m256i;
#define LOAD_BYTES(at) _mm256_loadu_si256(reinterpret_cast<const __m256i*>(at))
#define NO_BYTES _mm256_setzero_si256()
#define ADD_PRODUCTS(to, code, asked) \
    _mm256_add_epi32(to, _mm256_madd_epi16(_mm256_maddubs_epi16(code, asked), _mm256_set1_epi16(1)))
#endif

#if defined(__AVX512BW__)
// Whether the processor multiplies bytes and adds four products at a time.
const bool has_vnni = [] {
    unsigned a = 7, b = 0, c = 0, d = 0;
    __asm__ volatile("cpuid" : "+a"(a), "=b"(b), "+c"(c), "=d"(d));
    return (c >> 11 & 1) != 0;
}();
#define VNNI __attribute__((target("avx512vnni")))
#endif

#define CODE_DOTS(name, attribute, add)                                                        \
    template <int R, int C>                                                                    \
    attribute void name(const int8_t* left, const uint8_t* right, int64_t width, int64_t ahead, \
                        int32_t* out, int64_t out_stride) {                                    \
        Bytes total[R * C];                                                                    \
        _Pragma("unroll") for (int i = 0; i < R * C; ++i) total[i] = NO_BYTES;                 \
        for (int64_t d = 0; d < width; d += sizeof(Bytes)) {                                   \
            Bytes asked[R];                                                                    \
            _Pragma("unroll") for (int r = 0; r < R; ++r) {                                    \
                asked[r] = LOAD_BYTES(left + r * width + d);                                   \
            }                                                                                  \
            _Pragma("unroll") for (int c = 0; c < C; ++c) {                                    \
                const Bytes code = LOAD_BYTES(right + c * width + d);                          \
                if (ahead) __builtin_prefetch(right + c * width + d + ahead, 0, 2);            \
                _Pragma("unroll") for (int r = 0; r < R; ++r) {                                \
                    total[r * C + c] = add(total[r * C + c], code, asked[r]);                  \
                }                                                                              \
            }                                                                                  \
        }                                                                                      \
        Vector<int32_t> parts[R * C];                                                          \
        memcpy(parts, total, sizeof parts);                                                    \
        int32_t result[R * C];                                                                 \
        _Pragma("unroll") for (int i = 0; i < R * C; i += lanes<int32_t>) {                    \
            store(result + i, sums<int32_t>(parts + i));                                       \
        }                                                                                      \
        for (int r = 0; r < R; ++r) memcpy(out + r * out_stride, result + r * C, C * sizeof *out); \
    }

CODE_DOTS(code_dots, , ADD_PRODUCTS)
#if defined(__AVX512BW__)
CODE_DOTS(code_dots_vnni, VNNI, _mm512_dpbusd_epi32)
#endif
#else
template <int R, int C>
void code_dots(const int8_t* left, const uint8_t* right, int64_t width, int64_t, int32_t* out,
               int64_t out_stride) {
    for (int r = 0; r < R; ++r) {
        for (int c = 0; c < C; ++c) {
            int32_t total = 0;
            for (int64_t d = 0; d < width; ++d) {
                total += static_cast<int32_t>(left[r * width + d]) * right[c * width + d];
            }
            out[r * out_stride + c] = total;
        }
    }
}
#endif

// The largest number of a route's code.
inline int most_asked() {
#if defined(__AVX512BW__)
    if (has_vnni) return 127;
#endif
    return 63;
}

// out[r, c] = left[r] . right[c] of codes, for rows up to 4 and kBlock columns, a whole number of
// which there is room for.
inline void code_products(const int8_t* left, int64_t rows, const uint8_t* right, int64_t columns,
                          int64_t width, int64_t ahead, int32_t* out, int64_t out_stride) {
    constexpr int held_codes = lanes<int32_t> < 8 ? 8 : lanes<int32_t>;
    auto sweep = [&](auto count, int64_t r) __attribute__((always_inline)) {
        constexpr int R = sizeof(count), C = held_codes / R;
        for (int64_t c = 0; c < columns; c += C) {
            auto* to = out + r * out_stride + c;
#if defined(__AVX512BW__)
            if (has_vnni) {
                code_dots_vnni<R, C>(left + r * width, right + c * width, width, ahead, to, out_stride);
                continue;
            }
#endif
            code_dots<R, C>(left + r * width, right + c * width, width, ahead, to, out_stride);
        }
    };
    int64_t r = 0;
    if (rows - r >= 4) sweep(int32_t(), r), r += 4;
    if (rows - r >= 2) sweep(int16_t(), r), r += 2;
    if (r < rows) sweep(int8_t(), r);
}

inline Asked ask(const float* route, int64_t dim, int64_t width, int8_t* code) {
    const int most = most_asked();
    float largest_one = 0;
    double square = 0;
    for (int64_t d = 0; d < dim; ++d) {
        const float size = route[d] < 0 ? -route[d] : route[d];
        if (!(size <= largest_one)) largest_one = size;
        square += static_cast<double>(route[d]) * route[d];
    }
    const double slack = 1 + 0x1p-16;
    const float length = static_cast<float>(__builtin_sqrt(square) * slack);
    memset(code, 0, width);
    const float lost = static_cast<float>(dim + 64) * 4e-38f;
    if (!(largest_one > kShortest && largest_one < kLongest)) return {0, length, length, 0, lost};
    const double inverse = most / static_cast<double>(largest_one);
    int32_t total = 0;
    double left = 0;
    for (int64_t d = 0; d < dim; ++d) {
        const double x = static_cast<double>(route[d]) * inverse;
        const int whole = static_cast<int>(x + (x < 0 ? -0.5 : 0.5));
        code[d] = static_cast<int8_t>(whole);
        total += whole;
        left += (x - whole) * (x - whole);
    }
    const double step = 1 / inverse;
    const auto rest = static_cast<float>(__builtin_sqrt(left) * step * slack);
    return {static_cast<float>(step), length, rest, kZero * total, lost};
}

}  // namespace
