// The k best chunks of a query, and what their scores are made of.

#pragma once

#include "call.h"

namespace {

constexpr int64_t kSegment = 64;  // chunks that are worth a thread's while
constexpr int64_t kBlock = 16;    // chunks scored at a time: their summaries fit the nearest cache
constexpr double kLeak = 0x1p-10;  // of products above a ceiling
constexpr int64_t kQueries = 64;  // queries that read the summaries together

// In how many segments the chunks are gone through, so that `items` rows or blocks of queries keep
// all threads busy, and how many chunks are in each: a multiple of `whole`.
struct Segments {
    int64_t count, each;

    Segments(const Call& call, int64_t items, int64_t whole) {
        count = (call.threads + items - 1) / items;
        const int64_t most = call.chunks / kSegment;
        if (count > most) count = most;
        if (count < 1 || call.threads == 1) count = 1;
        each = (call.chunks + count - 1) / count;
        each = (each + whole - 1) / whole * whole;
    }
};

template <class T>
struct Best {
    T* scores;  // [K], best first
    int64_t* chunks;
    int64_t count, k;

    // NaN counts as the best, so that it is seen. Of equals the first to come stays.
    static bool better(T a, T b) { return a > b || (a != a && b == b); }

    // What a score must exceed; NaN while anything is welcome.
    T threshold() const {
        return count == k && k ? scores[k - 1] : static_cast<T>(__builtin_nan(""));
    }

    void add(T score, int64_t chunk) {
        if (count == k) {
            if (!k || !better(score, scores[k - 1])) return;
            --count;
        }
        int64_t i = count++;
        for (; i && better(score, scores[i - 1]); --i) {
            scores[i] = scores[i - 1];
            chunks[i] = chunks[i - 1];
        }
        scores[i] = score;
        chunks[i] = chunk;
    }
};

template <class T, class S>
void mean(const S* const* rows, int64_t count, double eps, int64_t width, T* out) {
    const T scale = static_cast<T>(1.0 / (static_cast<double>(count) + eps));
    int64_t d = 0;
    constexpr int V = 4;
    for (; d + V * lanes<T> <= width; d += V * lanes<T>) {
        Vector<T> total[V] = {};
        for (int64_t c = 0; c < count; ++c) {
#pragma unroll
            for (int v = 0; v < V; ++v) total[v] += load<T>(rows[c] + d + v * lanes<T>);
        }
#pragma unroll
        for (int v = 0; v < V; ++v) store(out + d + v * lanes<T>, total[v] * scale);
    }
    for (; d < width; d += lanes<T>) {
        const int64_t some = width - d < lanes<T> ? width - d : lanes<T>;
        Vector<T> total = {};
        for (int64_t c = 0; c < count; ++c) total += load<T>(rows[c] + d, some);
        store(out + d, total * scale, some);
    }
}

// What a query makes of the products of its route and summaries: the older a chunk, the less.
template <class T>
struct Fading {
    T ceiling, decay;
    const T* fading;  // [M]

    Fading(const Call& call, int64_t row, int64_t query)
        : ceiling(static_cast<const T*>(call.ceiling)[row * call.queries + query]),
          decay(static_cast<const T*>(call.decay)[row * call.queries + query]),
          fading(static_cast<const T*>(call.fading) +
                 row * call.fading_by_batch +
                 query * call.fading_by_query) {}

    // Scores of blocks of kBlock chunks, of which there are `count`, unless none exceeds the threshold.
    bool score(T* products, const int64_t* chunks, int64_t count, T threshold) const {
        T loss[kBlock] = {};
        for (int64_t c = 0; c < count; ++c) loss[c] = decay * fading[chunks[c]];
        Mask<T> pass = {};
        for (int64_t c = 0; c < kBlock; c += lanes<T>) {
            const Vector<T> most = bent(load<T>(products + c), Vector<T>{});
            pass |= ~(most - load<T>(loss + c) <= threshold);
        }
        if (!__builtin_reduce_or(pass)) return false;
        for (int64_t c = 0; c < kBlock; c += lanes<T>) {
            const Vector<T> product = load<T>(products + c), above = product - ceiling;
            const Vector<T> near = exponential<T>(choose<T>(above > 0, -above, above));
            store(products + c, bent(product, log_of_one_and<T>(near)) - load<T>(loss + c));
        }
        return true;
    }

    // The product, of which little is left above the ceiling; without the bend, no less than that.
    Vector<T> bent(Vector<T> product, Vector<T> bend) const {
        const Vector<T> above = product - ceiling;
        const Mask<T> is_above = above > 0;
        const Vector<T> most = choose<T>(is_above, splat<T>(ceiling), product);
        const Vector<T> leak = choose<T>(is_above, above, Vector<T>{}) + bend;
        return most - bend + static_cast<T>(kLeak) * leak;
    }

    // How much of a score's gradient is the product's; the rest is the ceiling's.
    T share_of_product(T product) const {
        const bool above = product > ceiling;
        const T odds = exponential<T>(splat<T>(above ? ceiling - product : product - ceiling))[0];
        const T share = (above ? odds : 1) / (1 + odds);
        return static_cast<T>(kLeak) + static_cast<T>(1 - kLeak) * share;
    }
};

}  // namespace
