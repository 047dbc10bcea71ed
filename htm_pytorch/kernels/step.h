// One step of a whole layer of `HTMTransformer`, for a row of the batch each: what costs a hundred
// operators of torch otherwise, whose calls take longer than their work.

#pragma once

#include "attend.h"
#include "pick.h"

extern "C" {

#define NORM_FIELDS(_)                 \
    _(const void*, weight) /* T [D] */ \
    _(const void*, bias)              \
    _(double, eps)

struct Norm {
    NORM_FIELDS(MEMBER)
};

#define AFFINE_FIELDS(_)                       \
    _(const void*, weight) /* T [F, D] */      \
    _(int64_t, apart)      /* of its rows */   \
    _(const void*, bias)   /* T [F], or null */

struct Affine {
    AFFINE_FIELDS(MEMBER)
};

#define STEP_FIELDS(_)                                                                       \
    _(Call, recall) /* of rows that each ask once; what it picks and attends is made here */ \
    _(int64_t, dim)                                                                          \
    _(int64_t, heads) /* of both attentions, each as wide */                                 \
    _(int64_t, width)                                                                        \
    _(int64_t, window) /* steps, the present one included */                                 \
    _(int64_t, features) /* of the router */                                                 \
    _(int64_t, hidden) /* of the MLP */                                                      \
    _(Norm, local_norm)                                                                      \
    _(Affine, to_qkv)                                                                        \
    _(Affine, to_local)                                                                      \
    _(const void*, distance_bias) /* T [H, window], the present step first */                \
    _(const void*, keys) /* T [B, window - 1, H, E], newest last, like the three below */    \
    _(const void*, values)                                                                   \
    _(void*, new_keys)                                                                       \
    _(void*, new_values)                                                                     \
    _(const int64_t*, filled) /* [B], of them */                                             \
    _(Norm, norm)                                                                            \
    _(int64_t, adds_normed) /* to what was recalled, instead of what it was made from */     \
    _(Affine, summary_queries)                                                               \
    _(Affine, summary_keys)                                                                  \
    _(Affine, recency) /* [2, D], to ceiling and decay; null weights: nothing fades */       \
    _(const void*, fading) /* T [M], log(1 + age), the newest chunk first */                 \
    _(const int64_t*, next_slot) /* [B] */                                                   \
    _(int64_t, slots) /* of the ring, those that hold nothing included */                    \
    _(Affine, queries)                                                                       \
    _(Affine, keys_values)                                                                   \
    _(Affine, to_out)                                                                        \
    _(Norm, mlp_norm)                                                                        \
    _(Affine, up)                                                                            \
    _(Affine, down)                                                                          \
    _(const void*, x) /* T [B, D] */                                                         \
    _(void*, steps) /* T [B, D], what the memory is to hold */                               \
    _(void*, y) /* T [B, D] */

struct Step {
    STEP_FIELDS(MEMBER)

    // Of what a row of the batch is made into on the way.
    int64_t widest() const {
        const int64_t sizes[] = {3 * heads * width, features, dim, hidden, window};
        int64_t most = 0;
        for (int64_t size : sizes) most = most < size ? size : most;
        return (most + 15) / 16 * 16;
    }
};
}

namespace {

constexpr int64_t kRows = 16;  // rows of the batch that read the weights together

// What a step hands to its recall, and gets from it.
template <class T>
struct Recalled {
    T *skip, *route, *probe, *context;  // [B, D], [B, D], [B, H, D], [B, H, D]
    T *ceiling, *decay, *fading;        // [B], [B], [B, M]
    int64_t* picked;                    // [B, K]
};

template <class T>
void normalise(const Norm& norm, const T* x, int64_t width, T* out) {
    const T *weight = static_cast<const T*>(norm.weight), *bias = static_cast<const T*>(norm.bias);
    auto over = [&](auto each) __attribute__((always_inline)) {
        int64_t d = 0;
        for (; d + lanes<T> <= width; d += lanes<T>) each(d, lanes<T>);
        if (d < width) each(d, width - d);
    };
    Vector<T> total = {};
    over([&](int64_t d, int64_t some) { total += load<T>(x + d, some); });
    const T mean = sum<T>(total) / width;
    Vector<T> squares = {};
    over([&](int64_t d, int64_t some) {
        T apart[lanes<T>] = {};
        store(apart, load<T>(x + d, some) - mean, some);
        const Vector<T> value = load<T>(apart);
        squares += value * value;
    });
    const T scale = 1 / __builtin_sqrt(sum<T>(squares) / width + norm.eps);
    over([&](int64_t d, int64_t some) {
        const Vector<T> value = (load<T>(x + d, some) - mean) * scale;
        store(out + d, value * load<T>(weight + d, some) + load<T>(bias + d, some), some);
    });
}

template <class T>
void normalise(const Norm& norm, const T* x, int64_t rows, int64_t width, T* out) {
    for (int64_t r = 0; r < rows; ++r) normalise<T>(norm, x + r * width, width, out + r * width);
}

template <class T>
void add(T* to, const T* from, int64_t count) {
    for (int64_t i = 0; i < count; ++i) to[i] += from[i];
}

// out[r] = W in[r] + b, with the F rows of W from `from` on.
template <class T>
void apply(const Affine& affine, int64_t from, int64_t features, const T* in, int64_t in_by_row,
           int64_t rows, int64_t width, T* out, int64_t out_by_row, const T** room) {
    const T* weight = static_cast<const T*>(affine.weight) + from * affine.apart;
    for (int64_t f = 0; f < features; ++f) room[f] = weight + f * affine.apart;
    products<T, T>(in, in_by_row, rows, room, features, width, out, out_by_row);
    if (!affine.bias) return;
    const T* bias = static_cast<const T*>(affine.bias) + from;
    for (int64_t r = 0; r < rows; ++r) add<T>(out + r * out_by_row, bias, features);
}

// out[r] = scale in[r] W, with the F rows of W from `from` on; `in` is scaled on the way.
template <class T>
void apply_turned(const Affine& affine, int64_t from, int64_t features, T* in, int64_t in_by_row,
                  T scale, int64_t rows, int64_t width, T* out, int64_t out_by_row,
                  const T** room) {
    const T* weight = static_cast<const T*>(affine.weight) + from * affine.apart;
    for (int64_t f = 0; f < features; ++f) room[f] = weight + f * affine.apart;
    for (int64_t r = 0; r < rows; ++r) {
        for (int64_t f = 0; f < features; ++f) in[r * in_by_row + f] *= scale;
        memset(out + r * out_by_row, 0, width * sizeof(T));
    }
    combine<T, T>(out, out_by_row, rows, in, in_by_row, 1, room, 0, features, width);
}

// x / 2 (1 + erf(x / sqrt 2)), with erf of Abramowitz and Stegun 7.1.26, to 1.5e-7.
void gelu(float* x, int64_t count) {
    for (int64_t i = 0; i < count; i += lanes<float>) {
        const int64_t some = count - i < lanes<float> ? count - i : lanes<float>;
        const Vector<float> value = load<float>(x + i, some);
        const Vector<float> positive = choose<float>(value < 0, -value, value);
        const Vector<float> z = positive * 0.70710678118654752f;
        const Vector<float> t = 1.0f / (1.0f + 0.3275911f * z);
        Vector<float> tail = splat(1.061405429f);
        tail = tail * t - 1.453152027f;
        tail = tail * t + 1.421413741f;
        tail = tail * t - 0.284496736f;
        tail = tail * t + 0.254829592f;
        // Half of 1 - erf(z); for negative values it is what remains of them.
        tail = tail * t * exponential<float>(-z * z) * 0.5f;
        store(x + i, value * choose<float>(value < 0, tail, 1.0f - tail), some);
    }
}

// What one row attends to among the newest steps; writes the window after it.
template <class T>
void attend_near(const Step& step, int64_t row, const T* qkv, T* out, T* logits, const T** room) {
    const int64_t H = step.heads, E = step.width, inner = H * E, past = step.window - 1;
    const T *keys = static_cast<const T*>(step.keys) + row * past * inner;
    const T *values = static_cast<const T*>(step.values) + row * past * inner;
    const T* bias = static_cast<const T*>(step.distance_bias);
    const int64_t said = step.filled[row], filled = said < 0 ? 0 : said < past ? said : past;
    const int64_t count = filled + 1, stride = padded(count);
    const T scale = 1 / __builtin_sqrt(static_cast<double>(E));
    memset(out, 0, inner * sizeof(T));
    for (int64_t h = 0; h < H; ++h) {
        for (int64_t c = 0; c < filled; ++c) room[c] = keys + (past - filled + c) * inner + h * E;
        room[filled] = qkv + inner + h * E;
        products<T, T>(qkv + h * E, E, 1, room, count, E, logits, stride);
        for (int64_t c = 0; c < count; ++c) {
            logits[c] = logits[c] * scale + bias[h * step.window + filled - c];
        }
        softmax<T>(logits, 1, stride, count, 1);
        for (int64_t c = 0; c < filled; ++c) room[c] = values + (past - filled + c) * inner + h * E;
        room[filled] = qkv + 2 * inner + h * E;
        combine<T, T>(out + h * E, 0, 1, logits, 0, 1, room, 0, count, E);
    }
    if (!past) return;
    T *new_keys = static_cast<T*>(step.new_keys) + row * past * inner;
    T *new_values = static_cast<T*>(step.new_values) + row * past * inner;
    memcpy(new_keys, keys + inner, (past - 1) * inner * sizeof(T));
    memcpy(new_values, values + inner, (past - 1) * inner * sizeof(T));
    memcpy(new_keys + (past - 1) * inner, qkv + inner, inner * sizeof(T));
    memcpy(new_values + (past - 1) * inner, qkv + 2 * inner, inner * sizeof(T));
}

// What the scores of one row fade by.
template <class T>
void fade(const Step& step, int64_t row, const T* normed, const Recalled<T>& to, const T** room) {
    T both[2 * kBlock];
    apply<T>(step.recency, 0, 2, normed, step.dim, 1, step.dim, both, kBlock, room);
    to.ceiling[row] = both[0];
    to.decay[row] = both[1];
    const int64_t chunks = step.recall.chunks, newest = step.next_slot[row] + step.slots - 1;
    const T* fading = static_cast<const T*>(step.fading);
    for (int64_t m = 0; m < chunks; ++m) {
        to.fading[row * chunks + m] = fading[(newest - m) % step.slots];
    }
}

template <class T>
void before_recall(Step& step, const Recalled<T>& to, int64_t begin, int64_t end) {
    const int64_t D = step.dim, H = step.heads, E = step.width, inner = H * E, F = step.features;
    Scratch<T> normed(kRows * D), made(kRows * step.widest()), near(kRows * inner);
    Scratch<T> logits(padded(step.window));
    Scratch<const T*> room(step.widest());
    if (!got(step.recall, normed, made, near, logits, room)) return;
    for (int64_t first = begin; first < end; first += kRows) {
        const int64_t rows = end - first < kRows ? end - first : kRows;
        const T* x = static_cast<const T*>(step.x) + first * D;
        T* steps = static_cast<T*>(step.steps) + first * D;
        normalise<T>(step.local_norm, x, rows, D, normed);
        apply<T>(step.to_qkv, 0, 3 * inner, normed, D, rows, D, made, 3 * inner, room);
        for (int64_t r = 0; r < rows; ++r) {
            attend_near<T>(step, first + r, made + r * 3 * inner, near + r * inner, logits, room);
        }
        apply<T>(step.to_local, 0, D, near, inner, rows, inner, steps, D, room);
        add<T>(steps, x, rows * D);
        normalise<T>(step.norm, steps, rows, D, normed);
        for (int64_t r = 0; step.recency.weight && r < rows; ++r) {
            fade<T>(step, first + r, normed + r * D, to, room);
        }
        memcpy(to.skip + first * D, step.adds_normed ? normed : steps, rows * D * sizeof(T));
        apply<T>(step.summary_queries, 0, F, normed, D, rows, D, made, F, room);
        const double by_feature = 1 / __builtin_sqrt(static_cast<double>(F));
        apply_turned<T>(step.summary_keys, 0, F, made, F, by_feature, rows, D, to.route + first * D,
                        D, room);
        apply<T>(step.queries, 0, inner, normed, D, rows, D, made, inner, room);
        const double by_width = 1 / __builtin_sqrt(static_cast<double>(E));
        for (int64_t h = 0; h < H; ++h) {
            apply_turned<T>(step.keys_values, h * E, E, made + h * E, inner, by_width, rows, D,
                            to.probe + (first * H + h) * D, H * D, room);
        }
    }
}

template <class T>
void after_recall(Step& step, const Recalled<T>& from, int64_t begin, int64_t end) {
    const int64_t D = step.dim, H = step.heads, E = step.width, inner = H * E, k = step.recall.k;
    Scratch<T> attended(kRows * inner), made(kRows * step.widest()), normed(kRows * D);
    Scratch<const T*> room(step.widest());
    if (!got(step.recall, attended, made, normed, room)) return;
    for (int64_t first = begin; first < end; first += kRows) {
        const int64_t rows = end - first < kRows ? end - first : kRows;
        T* y = static_cast<T*>(step.y) + first * D;
        for (int64_t h = 0; h < H; ++h) {
            apply<T>(step.keys_values, (H + h) * E, E, from.context + (first * H + h) * D, H * D,
                     rows, D, attended + h * E, inner, room);
        }
        apply<T>(step.to_out, 0, D, attended, inner, rows, inner, y, D, room);
        for (int64_t r = 0; r < rows; ++r) {
            // A query that sees no chunk gets zeros.
            if (!k || from.picked[(first + r) * k] < 0) memset(y + r * D, 0, D * sizeof(T));
        }
        add<T>(y, from.skip + first * D, rows * D);
        normalise<T>(step.mlp_norm, y, rows, D, normed);
        apply<T>(step.up, 0, step.hidden, normed, D, rows, D, made, step.hidden, room);
        gelu(made, rows * step.hidden);
        apply<T>(step.down, 0, D, made, step.hidden, rows, step.hidden, normed, D, room);
        add<T>(y, normed, rows * D);
    }
}

template <class T>
void step(Step& step) {
    Call& call = step.recall;
    const int64_t B = call.batch, D = step.dim, H = step.heads;
    Scratch<T> route(B * D), probe(B * H * D), context(B * H * D), weights(B * call.k), skip(B * D);
    Scratch<int64_t> picked(B * call.k);
    Scratch<T> ceiling(B), decay(B), fading(step.recency.weight ? B * call.chunks : 0);
    if (!got(call, route, probe, context, weights, skip, picked, ceiling, decay, fading)) return;
    const Recalled<T> recalled = {skip, route, probe, context, ceiling, decay, fading, picked};
    const int64_t blocks = (B + kRows - 1) / kRows;
    auto rows_of = [&](int64_t block) { return block * kRows < B ? block * kRows : B; };
    parallel(call, blocks, [&](int64_t begin, int64_t end) {
        before_recall<T>(step, recalled, rows_of(begin), rows_of(end));
    });
    if (call.failed) return;
    call.route = route;
    call.picked = picked;
    call.weights = weights;
    call.probe = {probe, H * D, D};
    call.context = {context, H * D, D};
    if (step.recency.weight) {
        call.ceiling = ceiling;
        call.decay = decay;
        call.fading = fading;
        call.fading_by_batch = call.chunks;
    }
    pick<T, T>(call);
    if (!call.failed) attend<T, T>(call);
    if (call.failed) return;
    parallel(call, blocks, [&](int64_t begin, int64_t end) {
        after_recall<T>(step, recalled, rows_of(begin), rows_of(end));
    });
}

}  // namespace
