// One call: every size and array of it, and what both operations ask of a memory.

#pragma once

#include <stdlib.h>

#include "products.h"

extern "C" {

typedef void Body(int64_t begin, int64_t end, void* context);
typedef int32_t Parallel(int64_t begin, int64_t end, int64_t grain, Body* body, void* context);

// What a call gets. Python reads the fields of a struct from its list, so that both have one layout.
#define MEMBER(type, name) type name;

// Rows of one width for every query and head: T [X, H, W].
#define HEADS_FIELDS(_)  \
    _(void*, at)         \
    _(int64_t, by_query) \
    _(int64_t, by_head)

struct Heads {
    HEADS_FIELDS(MEMBER)
};

// Summaries in 8 bits: about centre + scale (u + v / kFine), with u and v of 8 bits each.
#define CODES_FIELDS(_)                                                                          \
    _(uint8_t*, coarse) /* [B, M, W], u + kZero, W being D up to whole kLineBytes; or null */    \
    _(uint8_t*, fine) /* likewise v + kZero; or null */                                          \
    _(int64_t, by_batch)                                                                         \
    _(int64_t, width)                                                                            \
    _(float*, centres) /* [B, S, D], of kStretch chunks each */                                  \
    _(int64_t, centres_by_batch)                                                                 \
    _(float*, radii) /* [B, S]: no summary is farther from its centre */                         \
    _(int64_t, radii_by_batch)                                                                   \
    _(float*, scales) /* [B, M], like the three below */                                         \
    _(float*, sizes) /* the lengths of scale u */                                                \
    _(float*, errors) /* the lengths of what u leaves, and what products round */                \
    _(float*, fine_errors) /* of what both leave */                                              \
    _(int64_t, terms_by_batch)

struct Codes {
    CODES_FIELDS(MEMBER)
};

// Every array of one call. T is the type of sums, S that of what is stored. Masks are bytes; null
// means all true. Strides count elements.
#define CALL_FIELDS(_)                                                                           \
    _(Parallel*, parallel)                                                                       \
    _(int64_t, threads)                                                                          \
    _(int64_t, batch)                                                                            \
    _(int64_t, queries)                                                                          \
    _(int64_t, chunks)                                                                           \
    _(int64_t, chunk_size)                                                                       \
    _(int64_t, k)                                                                                \
    _(int64_t, memory_batch) /* `batch`, or 1: shared by all rows */                             \
    _(int64_t, missing) /* steps that the oldest chunk lacks, at its oldest end */               \
    /* The steps. Addresses are those of the oldest chunk's step 0, whether or not it exists. */ \
    _(const void*, rows) /* S [B, M, C, W]; projected: keys, S [B, M, C, H, W] */                \
    _(int64_t, rows_by_batch)                                                                    \
    _(int64_t, rows_by_step)                                                                     \
    _(const uint8_t*, step_mask) /* [B, M, C] */                                                 \
    _(int64_t, step_mask_by_batch)                                                               \
    _(int64_t, heads)                                                                            \
    _(int64_t, width)                                                                            \
    /* Picking. Chunks are scored by their summaries; without any, by the means of their rows. */\
    _(const void*, route) /* T [X, D] */                                                         \
    _(const void*, summaries) /* S [B, M, D] */                                                  \
    _(int64_t, summaries_by_batch)                                                               \
    _(int64_t, summaries_by_chunk)                                                               \
    _(int64_t, dim)                                                                              \
    _(Codes, codes) /* of the summaries */                                                       \
    _(double, eps) /* a mean is a sum over (count + eps) */                                      \
    _(const uint8_t*, valid) /* [B, M] */                                                        \
    _(int64_t, valid_by_batch)                                                                   \
    _(const uint8_t*, chunk_mask) /* [B, Q, M] */                                                \
    _(int64_t, chunk_mask_by_batch)                                                              \
    _(int64_t, chunk_mask_by_query)                                                              \
    /* A score is softmin(product, ceiling) - decay * fading; null ceilings mean the product. */ \
    _(const void*, ceiling) /* T [X] */                                                          \
    _(const void*, decay) /* T [X] */                                                            \
    _(const void*, fading) /* T [B, Q, M], log(1 + age); queries may share it */                 \
    _(int64_t, fading_by_batch)                                                                  \
    _(int64_t, fading_by_query)                                                                  \
    _(int64_t*, picked) /* [X, K]; -1: none */                                                   \
    _(void*, weights) /* T [X, K] */                                                             \
    /* Attending. */                                                                             \
    _(Heads, probe) /* T [X, H, W]; projected: queries */                                        \
    _(const void*, positions) /* T [C, W], or null */                                            \
    _(Heads, context) /* T [X, H, W] */                                                          \
    /* Backward of picking. */                                                                   \
    _(const void*, grad_picks) /* T [X, K], of the weights */                                    \
    _(void*, grad_scores) /* T [X, K] */                                                         \
    _(void*, grad_route) /* T [X, D] */                                                          \
    _(void*, grad_ceiling) /* T [X] */                                                           \
    _(void*, grad_decay) /* T [X] */                                                             \
    _(void*, grad_summaries) /* T [B, M, D], or null; zeros at first */                          \
    /* Backward of attending. */                                                                 \
    _(Heads, grad) /* T [X, H, W] */                                                             \
    _(Heads, grad_probe) /* T [X, H, W] */                                                       \
    _(void*, grad_weights) /* T [X, K]; projected: [H, X, K], a share of each head */            \
    _(void*, grad_rows) /* T, as rows; zeros at first */                                         \
    _(int64_t, grad_by_batch)                                                                    \
    _(int64_t, grad_by_step)                                                                     \
    _(void*, position_weights) /* T [X, 2, H, C], or null: as block_weights, over all chunks */  \
    /* Backward to the steps: pairs (query, pick) of the X in [first, last). */                  \
    _(int64_t, first)                                                                            \
    _(int64_t, last)                                                                             \
    _(void*, block_weights) /* T [last - first, K, 2, H, C]: gradients of logits, then weights */\
    _(int64_t*, starts) /* [B * M + 1] scratch */                                                \
    _(int64_t*, pairs) /* [(last - first) * K] scratch */                                        \
    /* Projected: in the rows, values lie this far behind keys, and heads are W apart. */        \
    _(int64_t, values_by)                                                                        \
    _(int64_t, owners) /* rows of the batch that share no chunk: B, or 1 */                      \
    _(double, scale) /* of the queries */                                                        \
    _(int32_t, failed) /* set to kNoMemory or kNoSuchChunk */

struct Call {
    CALL_FIELDS(MEMBER)
};

#define SEEK_FIELDS(_)                                                                        \
    _(Call, recall) /* whose picks and weights are not written */                             \
    _(int64_t, room)                                                                          \
    _(int64_t*, found) /* [X, room] chunks that may be among the k best, in any order; -1 */  \
    _(float*, upper)   /* [X, room], what they score at most */                               \
    _(float*, lower)                                                                          \
    _(int32_t, is_short) /* whether there were more than that, for any query */

struct Seek {
    SEEK_FIELDS(MEMBER)
};
}

namespace {

constexpr int32_t kNoMemory = 1, kNoSuchChunk = 2;

// A row of logits has room for whole vectors and for whole tiles of `products`.
int64_t padded(int64_t count) {
    return (count + 15) / 16 * 16;
}

// Bytes of scratch that are held, and the most there were.
int64_t held_bytes = 0, most_bytes = 0;

// Room that is given back at the end of the scope.
template <class X>
struct Scratch {
    int64_t bytes;
    X* at;
    explicit Scratch(int64_t count)
        : bytes((count + 1) * sizeof(X)), at(static_cast<X*>(malloc(bytes))) {
        const int64_t now = __atomic_add_fetch(&held_bytes, bytes, __ATOMIC_RELAXED);
        int64_t most = __atomic_load_n(&most_bytes, __ATOMIC_RELAXED);
        while (most < now && !__atomic_compare_exchange_n(&most_bytes, &most, now, true,
                                                          __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
        }
    }
    Scratch(const Scratch&) = delete;
    ~Scratch() {
        free(at);
        __atomic_sub_fetch(&held_bytes, bytes, __ATOMIC_RELAXED);
    }
    operator X*() const { return at; }
};

// Whether all scratch was had; if not, the caller is told, who raises an error.
template <class C, class... X>
bool got(C& call, const Scratch<X>&... all) {
    const bool ok = (... && (all.at != nullptr));
    if (!ok) call.failed = kNoMemory;
    return ok;
}

// Whether every pick is a chunk, or -1; if not, the caller is told.
bool picks_exist(Call& call) {
    const int64_t count = call.batch * call.queries * call.k;
    bool ok = true;
    for (int64_t i = 0; i < count; ++i) ok &= -1 <= call.picked[i] && call.picked[i] < call.chunks;
    if (!ok) call.failed = kNoSuchChunk;
    return ok;
}

// Numbers too small to be normal count as 0 in its scope: a weight of 1e-40 changes nothing, but
// each product with it would take a hundred times as long.
struct TinyIsZero {
#if defined(__x86_64__)
    unsigned before = __builtin_ia32_stmxcsr();
    TinyIsZero() { __builtin_ia32_ldmxcsr(before | 0x8040); }
    ~TinyIsZero() { __builtin_ia32_ldmxcsr(before); }
#elif defined(__aarch64__)
    uint64_t before;
    TinyIsZero() {
        __asm__ volatile("mrs %0, fpcr" : "=r"(before));
        __asm__ volatile("msr fpcr, %0" : : "r"(before | (1ull << 24)));
    }
    ~TinyIsZero() { __asm__ volatile("msr fpcr, %0" : : "r"(before)); }
#endif
};

template <class F>
void in_parallel(Parallel* loop, int64_t threads, int64_t count, F body) {
    auto run = [](int64_t begin, int64_t end, void* context) {
        TinyIsZero scope;
        (*static_cast<F*>(context))(begin, end);
    };
    if (threads == 1 || count <= 1) {
        if (count) run(0, count, &body);
    } else {
        loop(0, count, 1, run, &body);
    }
}

template <class F>
void parallel(Call& call, int64_t count, F body) {
    in_parallel(call.parallel, call.threads, count, body);
}

// Which steps of chunk m exist and are not masked.
int64_t numbers_of(const Call& call, int64_t row, int64_t m, int32_t* number) {
    const uint8_t* mask = nullptr;
    if (call.step_mask) {
        mask = call.step_mask + row * call.step_mask_by_batch + m * call.chunk_size;
    }
    int64_t count = 0;
    for (int64_t c = m ? 0 : call.missing; c < call.chunk_size; ++c) {
        number[count] = static_cast<int32_t>(c);
        count += mask ? mask[c] != 0 : 1;
    }
    return count;
}

// The same, with pointers to their rows.
template <class S>
int64_t steps_of(const Call& call, int64_t row, int64_t m, const S** rows, int32_t* number) {
    const S* chunk = static_cast<const S*>(call.rows) + row * call.rows_by_batch +
                     m * call.chunk_size * call.rows_by_step;
    const int64_t count = numbers_of(call, row, m, number);
    for (int64_t i = 0; i < count; ++i) rows[i] = chunk + number[i] * call.rows_by_step;
    return count;
}

inline Ahead no_look() {
    static const char nothing[kLineBytes] = {};
    return {nothing, nothing, 0};
}

// Rows to be read while products of `size` multiplications are at work. Their pages are touched at
// once, since a processor that finds none in its table waits for each in turn.
template <class T>
Ahead look_ahead(const char* first, int64_t rows, int64_t apart, int64_t width, int64_t size) {
    const int64_t bytes = rows * apart, pages = apart > kPageBytes ? apart : kPageBytes;
    for (int64_t i = 0; i < bytes; i += pages) __builtin_prefetch(first + i, 0, 2);
    if (apart != width || bytes < kLineBytes) return no_look();
    const int64_t lines = bytes / kLineBytes, times = size / (held<T> * lanes<T>);
    return {first, first + bytes - kLineBytes, (lines / (times + 1) + 1) * kLineBytes};
}

// Sort the (query, pick) pairs of a block by their chunk, so that each chunk has one owner: sums
// have one order whatever the number of threads.
void sort_pairs(Call& call) {
    const int64_t slots = call.memory_batch * call.chunks, k = call.k;
    memset(call.starts, 0, (slots + 1) * sizeof(int64_t));
    auto slot = [&](int64_t pair) {
        const int64_t m = call.picked[pair];
        const int64_t row = call.memory_batch == 1 ? 0 : pair / k / call.queries;
        return m < 0 ? -1 : row * call.chunks + m;
    };
    for (int64_t pair = call.first * k; pair < call.last * k; ++pair) {
        if (slot(pair) >= 0) ++call.starts[slot(pair) + 1];
    }
    for (int64_t s = 0; s < slots; ++s) call.starts[s + 1] += call.starts[s];
    for (int64_t pair = call.first * k; pair < call.last * k; ++pair) {
        if (slot(pair) >= 0) call.pairs[call.starts[slot(pair)]++] = pair;
    }
    // Each start has moved to the next one's place.
    for (int64_t s = slots; s > 0; --s) call.starts[s] = call.starts[s - 1];
    call.starts[0] = 0;
}

}  // namespace
