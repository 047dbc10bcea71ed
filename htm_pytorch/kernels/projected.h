// Attend inside the picked chunks to keys and values of each head's own: chunk by chunk, with all the
// queries that picked it. An item of work is a head of the rows that share chunks, so that no two
// threads write to the same place.

#pragma once

#include "call.h"
#include "products.h"
#include "softmax.h"

namespace {

constexpr int64_t kTogether = 64;  // queries of a chunk at a time
constexpr int64_t kReach = 2048;   // queries whose rows stay in cache while chunks pass by

// The pairs of a block of `kReach` queries, chunk by chunk. Blocks do not cross rows of the batch.
struct Pairs {
    int64_t blocks_a_row, blocks;
    Scratch<int64_t> pair, start;  // [X * K], [blocks + 1]

    static int64_t blocks_of(int64_t queries) { return (queries + kReach - 1) / kReach; }

    explicit Pairs(Call& call)
        : blocks_a_row(blocks_of(call.queries)),
          blocks(call.batch * blocks_a_row),
          pair(call.batch * call.queries * call.k),
          start(blocks + 1) {
        if (!got(call, pair, start)) return;
        sort_pairs(call);
        // By chunk they are; a stable sort by block makes it: by block, then by chunk.
        const int64_t total = call.starts[call.memory_batch * call.chunks];
        memset(start, 0, (blocks + 1) * sizeof(int64_t));
        for (int64_t i = 0; i < total; ++i) ++start[block_of(call, call.pairs[i]) + 1];
        for (int64_t b = 0; b < blocks; ++b) start[b + 1] += start[b];
        for (int64_t i = 0; i < total; ++i) {
            pair[start[block_of(call, call.pairs[i])]++] = call.pairs[i];
        }
        for (int64_t b = blocks; b > 0; --b) start[b] = start[b - 1];
        start[0] = 0;
    }

    int64_t block_of(const Call& call, int64_t which) const {
        const int64_t x = which / call.k;
        return x / call.queries * blocks_a_row + x % call.queries / kReach;
    }
};

// Call `run(pairs, count, m)` for every chunk and up to kTogether of a block's queries that picked it.
template <class F>
void for_chunks(const Call& call, const Pairs& all, int64_t block, F run) {
    const int64_t end = all.start[block + 1];
    for (int64_t i = all.start[block]; i < end;) {
        const int64_t m = call.picked[all.pair[i]];
        int64_t count = 1;
        while (i + count < end && count < kTogether && call.picked[all.pair[i + count]] == m) {
            ++count;
        }
        run(all.pair + i, count, m);
        i += count;
    }
}

// One head of a block of queries, side by side.
template <class T>
struct Near {
    const Call& call;
    int64_t h, first, count;  // of the queries
    Near(const Call& call, const Pairs& all, int64_t block, int64_t h) : call(call), h(h) {
        const int64_t within = block % all.blocks_a_row * kReach;
        first = block / all.blocks_a_row * call.queries + within;
        count = call.queries - within < kReach ? call.queries - within : kReach;
    }

    T* at(const Heads& heads, int64_t i) const {
        return static_cast<T*>(heads.at) + (first + i) * heads.by_query + h * heads.by_head;
    }

    void fetch(const Heads& from, T* to, T scale) const {
        const int64_t W = call.width;
        for (int64_t i = 0; i < count; ++i) {
            const T* row = at(from, i);
            for (int64_t d = 0; d < W; ++d) to[i * W + d] = row[d] * scale;
        }
    }

    void put(const T* from, const Heads& to, T scale) const {
        const int64_t W = call.width;
        for (int64_t i = 0; i < count; ++i) {
            T* row = at(to, i);
            for (int64_t d = 0; d < W; ++d) row[d] = from[i * W + d] * scale;
        }
    }

    // Rows of the pairs' queries, one behind the other, and back.
    void gather(const T* from, const int64_t* pairs, int64_t pair_count, T* to) const {
        for (int64_t i = 0; i < pair_count; ++i) {
            memcpy(to + i * call.width, from + (pairs[i] / call.k - first) * call.width,
                   call.width * sizeof(T));
        }
    }

    void scatter(const T* from, const int64_t* pairs, int64_t pair_count, T* to) const {
        for (int64_t i = 0; i < pair_count; ++i) {
            memcpy(to + (pairs[i] / call.k - first) * call.width, from + i * call.width,
                   call.width * sizeof(T));
        }
    }
};

template <class T, class S>
void attend_projected(Call& call) {
    if (!picks_exist(call)) return;
    const int64_t W = call.width, stride = padded(call.chunk_size);
    const int64_t reach = call.queries < kReach ? call.queries : kReach;
    Pairs all(call);
    if (call.failed) return;
    parallel(call, call.owners * call.heads, [&](int64_t begin, int64_t end) {
        Scratch<const S*> rows(stride);
        Scratch<const T*> turned(W);
        Scratch<int32_t> number(stride);
        Scratch<T> keys(W * stride), logits(kTogether * stride);
        Scratch<T> near_rows(2 * reach * W), mine(2 * kTogether * W);
        if (!got(call, rows, turned, number, keys, logits, near_rows, mine)) return;
        T *near_queries = near_rows, *near_context = near_rows + reach * W;
        T *queries = mine, *context = mine + kTogether * W;
        for (int64_t d = 0; d < W; ++d) turned[d] = keys + d * stride;
        for (int64_t item = begin; item < end; ++item) {
            const int64_t h = item % call.heads, owner = item / call.heads;
            const int64_t each = all.blocks / call.owners;
            int64_t held = -1, there = 0;
            for (int64_t block = owner * each; block < (owner + 1) * each; ++block) {
                const Near<T> near(call, all, block, h);
                near.fetch(call.probe, near_queries, static_cast<T>(call.scale));
                memset(near_context, 0, near.count * W * sizeof(T));
                for_chunks(call, all, block, [&](const int64_t* pairs, int64_t count, int64_t m) {
                    if (m != held) {
                        there = steps_of<S>(call, 0, m, rows, number);
                        turn<T, S>(rows, h * W, there, W, keys, stride);
                        held = m;
                    }
                    if (!there) return;
                    near.gather(near_queries, pairs, count, queries);
                    near.gather(near_context, pairs, count, context);
                    memset(logits, 0, count * stride * sizeof(T));
                    combine<T, T>(logits, stride, count, queries, W, 1, turned, 0, W, stride);
                    for (int64_t i = 0; i < count; ++i) {
                        const T weight = static_cast<const T*>(call.weights)[pairs[i]];
                        softmax<T>(logits + i * stride, 1, stride, there, weight);
                    }
                    combine<T, S>(context, W, count, logits, stride, 1, rows,
                                  h * W + call.values_by, there, W);
                    near.scatter(context, pairs, count, near_context);
                });
                near.put(near_context, call.context, 1);
            }
        }
    });
}

template <class T, class S>
void attend_projected_backward(Call& call) {
    if (!picks_exist(call)) return;
    const int64_t C = call.chunk_size, W = call.width, stride = padded(C);
    const int64_t reach = call.queries < kReach ? call.queries : kReach;
    const T scale = static_cast<T>(call.scale);
    Pairs all(call);
    if (call.failed) return;
    parallel(call, call.owners * call.heads, [&](int64_t begin, int64_t end) {
        Scratch<const S*> rows(stride);
        Scratch<const T*> turned_keys(W), turned_values(W);
        Scratch<const T*> query_rows(kTogether), grad_rows(kTogether);
        Scratch<int32_t> number(stride);
        Scratch<T> turned(2 * W * stride), logits(2 * kTogether * stride), sums(2 * C * W);
        Scratch<T> near_rows(3 * reach * W), mine(3 * kTogether * W);
        if (!got(call, rows, turned_keys, turned_values, query_rows, grad_rows, number, turned,
                 logits, sums, near_rows, mine)) {
            return;
        }
        T *keys = turned, *values = turned + W * stride;
        T *inside = logits, *gained = logits + kTogether * stride;
        T *grad_keys = sums, *grad_values = sums + C * W;
        T *near_queries = near_rows, *near_grad = near_rows + reach * W;
        T* near_grad_queries = near_rows + 2 * reach * W;
        T *queries = mine, *grad = mine + kTogether * W, *grad_queries = mine + 2 * kTogether * W;
        for (int64_t d = 0; d < W; ++d) {
            turned_keys[d] = keys + d * stride;
            turned_values[d] = values + d * stride;
        }
        for (int64_t i = 0; i < kTogether; ++i) {
            query_rows[i] = queries + i * W;
            grad_rows[i] = grad + i * W;
        }
        for (int64_t item = begin; item < end; ++item) {
            const int64_t h = item % call.heads, owner = item / call.heads;
            const int64_t each = all.blocks / call.owners;
            auto* grad_weights =
                static_cast<T*>(call.grad_weights) + h * call.batch * call.queries * call.k;
            int64_t held = -1, there = 0;
            auto leave = [&] {
                if (!there) return;
                T* out = static_cast<T*>(call.grad_rows) + held * C * call.grad_by_step + h * W;
                for (int64_t i = 0; i < there; ++i) {
                    T* to = out + number[i] * call.grad_by_step;
                    for (int64_t d = 0; d < W; ++d) to[d] += grad_keys[i * W + d];
                    to += call.values_by;
                    for (int64_t d = 0; d < W; ++d) to[d] += grad_values[i * W + d];
                }
            };
            for (int64_t block = owner * each; block < (owner + 1) * each; ++block) {
                const Near<T> near(call, all, block, h);
                near.fetch(call.probe, near_queries, scale);
                near.fetch(call.grad, near_grad, 1);
                memset(near_grad_queries, 0, near.count * W * sizeof(T));
                for_chunks(call, all, block, [&](const int64_t* pairs, int64_t count, int64_t m) {
                    if (m != held) {
                        leave();
                        there = steps_of<S>(call, 0, m, rows, number);
                        turn<T, S>(rows, h * W, there, W, keys, stride);
                        turn<T, S>(rows, h * W + call.values_by, there, W, values, stride);
                        memset(sums, 0, 2 * C * W * sizeof(T));
                        held = m;
                    }
                    if (!there) return;
                    near.gather(near_queries, pairs, count, queries);
                    near.gather(near_grad, pairs, count, grad);
                    near.gather(near_grad_queries, pairs, count, grad_queries);
                    memset(logits, 0, 2 * kTogether * stride * sizeof(T));
                    combine<T, T>(inside, stride, count, queries, W, 1, turned_keys, 0, W, stride);
                    combine<T, T>(gained, stride, count, grad, W, 1, turned_values, 0, W, stride);
                    for (int64_t i = 0; i < count; ++i) {
                        T *a = inside + i * stride, *b = gained + i * stride;
                        softmax<T>(a, 1, stride, there, 1);
                        const T weight = static_cast<const T*>(call.weights)[pairs[i]];
                        grad_weights[pairs[i]] = softmax_backward(a, b, there, weight);
                    }
                    combine<T, S>(grad_queries, W, count, gained, stride, 1, rows, h * W, there, W);
                    near.scatter(grad_queries, pairs, count, near_grad_queries);
                    combine<T, T>(grad_keys, W, there, gained, 1, stride, query_rows, 0, count, W);
                    combine<T, T>(grad_values, W, there, inside, 1, stride, grad_rows, 0, count, W);
                });
                near.put(near_grad_queries, call.grad_probe, scale);
            }
            leave();
        }
    });
}

}  // namespace
