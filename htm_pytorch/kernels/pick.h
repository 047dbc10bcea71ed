// Keep the k best chunks of each query, and the way back to route and summaries.

#pragma once

#include "coded.h"

namespace {

// Score the chunks [begin, end) for queries [first, last) of one row and keep the best.
template <class T, class S>
void pick_segment(Call& call, int64_t row, int64_t first, int64_t last, int64_t begin,
                  int64_t end, Best<T>* best) {
    const int64_t memory_row = call.memory_batch == 1 ? 0 : row;
    const bool means = !call.summaries;
    Scratch<T> average(means ? kBlock * call.dim : 0);
    Scratch<const S*> steps(means ? call.chunk_size : 0);
    Scratch<int32_t> numbers(means ? call.chunk_size : 0);
    if (!got(call, average, steps, numbers)) return;
    const T* route = static_cast<const T*>(call.route) + row * call.queries * call.dim;
    const uint8_t* mask = call.chunk_mask;
    if (mask) mask += row * call.chunk_mask_by_batch;
    const S* held_rows[2 * kBlock];
    const T* mean_rows[2 * kBlock];
    int64_t chunks[kBlock];
    T scores[4 * kBlock];
    int64_t next = begin;
    while (next < end) {
        int64_t count = 0;
        for (; next < end && count < kBlock; ++next) {
            if (call.valid && !call.valid[memory_row * call.valid_by_batch + next]) continue;
            if (means) {
                const int64_t there = steps_of<S>(call, memory_row, next, steps, numbers);
                if (!there) continue;
                mean_rows[count] = average + count * call.dim;
                mean<T, S>(steps, there, call.eps, call.dim, average + count * call.dim);
            } else {
                held_rows[count] = static_cast<const S*>(call.summaries) +
                                   memory_row * call.summaries_by_batch +
                                   next * call.summaries_by_chunk;
            }
            chunks[count++] = next;
        }
        Ahead ahead = no_look();
        if (!means && next < end) {
            const int64_t rows = end - next < kBlock ? end - next : kBlock;
            const S* first_row = static_cast<const S*>(call.summaries) +
                                 memory_row * call.summaries_by_batch +
                                 next * call.summaries_by_chunk;
            ahead = look_ahead<T>(reinterpret_cast<const char*>(first_row), rows,
                                  call.summaries_by_chunk * sizeof(S), call.dim * sizeof(S),
                                  (last - first) * kBlock * call.dim);
        }
        for (int64_t q = first; count && q < last; q += 4) {
            const int64_t rows = last - q < 4 ? last - q : 4;
            if (mask) {
                uint8_t any = 0;
                for (int64_t r = 0; r < rows; ++r) {
                    const uint8_t* seen = mask + (q + r) * call.chunk_mask_by_query;
                    for (int64_t c = 0; c < count; ++c) any |= seen[chunks[c]];
                }
                if (!any) continue;
            }
            if (means) {
                products<T, T>(route + q * call.dim, call.dim, rows, mean_rows, count, call.dim, scores,
                               kBlock);
            } else {
                products<T, S>(route + q * call.dim, call.dim, rows, held_rows, count, call.dim, scores,
                               kBlock, ahead);
            }
            for (int64_t r = 0; r < rows; ++r) {
                Best<T>& mine = best[q + r - first];
                const T threshold = mine.threshold();
                T* score = scores + r * kBlock;
                for (int64_t c = count; c < kBlock; ++c) score[c] = threshold;
                if (call.ceiling) {
                    const Fading<T> fading(call, row, q + r);
                    if (!fading.score(score, chunks, count, threshold)) continue;
                    for (int64_t c = count; c < kBlock; ++c) score[c] = threshold;
                }
                Mask<T> pass = {};
                for (int64_t c = 0; c < kBlock; c += lanes<T>) {
                    pass |= ~(load<T>(score + c) <= threshold);
                }
                if (!__builtin_reduce_or(pass)) continue;
                const uint8_t* seen = mask ? mask + (q + r) * call.chunk_mask_by_query : nullptr;
                for (int64_t c = 0; c < count; ++c) {
                    if (!seen || seen[chunks[c]]) mine.add(score[c], chunks[c]);
                }
            }
        }
    }
}

template <class T>
void weigh(const Best<T>& best, T* weights, int64_t* picked) {
    T total = 0;
    for (int64_t j = 0; j < best.k; ++j) {
        const bool there = j < best.count;
        picked[j] = there ? best.chunks[j] : -1;
        weights[j] = there ? exponential<T>(splat(best.scores[j] - best.scores[0]))[0] : 0;
        total += weights[j];
    }
    for (int64_t j = 0; j < best.count; ++j) weights[j] /= total;
}

template <class T, class S>
void pick(Call& call) {
    const int64_t k = call.k, queries = call.queries;
    const int64_t pairs = call.batch * queries;
    // Means are taken once for all queries; summaries that are held are read once a block of them.
    int64_t block = call.summaries ? kQueries : queries;
    if (block > queries) block = queries;
    if (!block) return;
    const int64_t blocks = (queries + block - 1) / block;
    const Segments parts(call, call.batch * blocks, call.codes.coarse ? kStretch : 1);
    const int64_t segments = parts.count, each = parts.each;
    Scratch<T> scores(segments * pairs * k);
    Scratch<int64_t> chunks(segments * pairs * k);
    Scratch<Best<T>> best(segments * pairs);
    if (!got(call, scores, chunks, best)) return;
    // A thread takes items far apart: where queries see the past only, the last ones see most.
    const int64_t items = call.batch * blocks * segments;
    const int64_t share = (items + call.threads - 1) / call.threads;
    parallel(call, share * call.threads, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
            const int64_t item = i % share * call.threads + i / share;
            if (item >= items) continue;
            const int64_t segment = item % segments;
            const int64_t row = item / segments / blocks;
            const int64_t first = item / segments % blocks * block;
            const int64_t last = first + block < queries ? first + block : queries;
            const int64_t start = segment * pairs + row * queries + first;
            for (int64_t x = start; x < start + last - first; ++x) {
                best[x] = {scores + x * k, chunks + x * k, 0, k};
            }
            int64_t from = segment * each;
            const int64_t to = from + each < call.chunks ? from + each : call.chunks;
            if constexpr (same<T, float>) {
                if (call.codes.coarse) {
                    from = pick_coded<S>(call, row, first, last, from, to, best + start);
                }
            }
            pick_segment<T, S>(call, row, first, last, from, to, best + start);
        }
    });
    parallel(call, pairs, [&](int64_t begin, int64_t end) {
        for (int64_t x = begin; x < end; ++x) {
            Best<T>& all = best[x];
            for (int64_t segment = 1; segment < segments; ++segment) {
                const Best<T>& part = best[segment * pairs + x];
                for (int64_t j = 0; j < part.count; ++j) all.add(part.scores[j], part.chunks[j]);
            }
            weigh(all, static_cast<T*>(call.weights) + x * k, call.picked + x * k);
        }
    });
}

// The gradients of what a query's scores fade by.
template <class T>
struct Fades {
    T to_ceiling, to_decay;
};

// Add a score's gradient `scale` to those of the route and of the fading. Returns the product's.
template <class T, class S>
T into_route(const Call& call, int64_t x, int64_t m, T scale, const S* summary, T* out,
             Fades<T>& fades) {
    const int64_t dim = call.dim;
    if (call.ceiling) {
        const Fading<T> fading(call, x / call.queries, x % call.queries);
        const S* rows[2 * kBlock] = {summary};
        T product[4 * kBlock];
        products<T, S>(static_cast<const T*>(call.route) + x * dim, dim, 1, rows, 1, dim, product,
                       kBlock);
        const T share = scale * fading.share_of_product(product[0]);
        fades.to_ceiling += scale - share;
        fades.to_decay -= scale * fading.fading[m];
        scale = share;
    }
    combine<T, S>(out, 0, 1, &scale, 0, 0, &summary, 0, 1, dim);
    return scale;
}

// grad_route[x] = sum_j d_j s_j, with d the gradient of the products.
template <class T, class S>
void pick_backward(Call& call) {
    if (!picks_exist(call)) return;
    const int64_t k = call.k, dim = call.dim;
    auto* grad_scores = static_cast<T*>(call.grad_scores);
    parallel(call, call.batch * call.queries, [&](int64_t begin, int64_t end) {
        Scratch<const S*> steps(call.chunk_size);
        Scratch<int32_t> numbers(call.chunk_size);
        Scratch<T> average(dim);
        if (!got(call, steps, numbers, average)) return;
        for (int64_t x = begin; x < end; ++x) {
            const int64_t row = call.memory_batch == 1 ? 0 : x / call.queries;
            const T* weights = static_cast<const T*>(call.weights) + x * k;
            const T* grad = static_cast<const T*>(call.grad_picks) + x * k;
            T* out = static_cast<T*>(call.grad_route) + x * dim;
            memset(out, 0, dim * sizeof(T));
            T total = 0;
            Fades<T> fades = {};
            for (int64_t j = 0; j < k; ++j) total += weights[j] * grad[j];
            for (int64_t j = 0; j < k; ++j) {
                const int64_t m = call.picked[x * k + j];
                T scale = weights[j] * (grad[j] - total);
                grad_scores[x * k + j] = 0;
                if (m < 0) continue;
                if (call.summaries) {
                    const S* summary = static_cast<const S*>(call.summaries) +
                                       row * call.summaries_by_batch + m * call.summaries_by_chunk;
                    scale = into_route<T, S>(call, x, m, scale, summary, out, fades);
                } else {
                    const int64_t there = steps_of<S>(call, row, m, steps, numbers);
                    mean<T, S>(steps, there, call.eps, dim, average);
                    scale = into_route<T, T>(call, x, m, scale, average, out, fades);
                }
                grad_scores[x * k + j] = scale;
            }
            if (call.ceiling) {
                static_cast<T*>(call.grad_ceiling)[x] = fades.to_ceiling;
                static_cast<T*>(call.grad_decay)[x] = fades.to_decay;
            }
        }
    });
}

// Without summaries of its own, a chunk's share goes to the steps it is the mean of.
template <class T>
void pick_backward_summaries(Call& call) {
    const int64_t dim = call.dim;
    sort_pairs(call);
    parallel(call, call.memory_batch * call.chunks, [&](int64_t begin, int64_t end) {
        Scratch<T> total(dim);
        Scratch<int32_t> numbers(call.chunk_size);
        if (!got(call, total, numbers)) return;
        for (int64_t slot = begin; slot < end; ++slot) {
            const int64_t row = slot / call.chunks, m = slot % call.chunks;
            if (call.starts[slot] == call.starts[slot + 1]) continue;
            T* out = total;
            if (call.grad_summaries) out = static_cast<T*>(call.grad_summaries) + slot * dim;
            if (!call.grad_summaries) memset(out, 0, dim * sizeof(T));
            for (int64_t i = call.starts[slot]; i < call.starts[slot + 1]; ++i) {
                const int64_t x = call.pairs[i] / call.k;
                const T* route = static_cast<const T*>(call.route) + x * dim;
                const T* scale = static_cast<const T*>(call.grad_scores) + call.pairs[i];
                combine<T, T>(out, 0, 1, scale, 0, 0, &route, 0, 1, dim);
            }
            if (call.grad_summaries) continue;
            const int64_t there = numbers_of(call, row, m, numbers);
            const T share = static_cast<T>(1.0 / (static_cast<double>(there) + call.eps));
            const T* source = total;
            for (int64_t c = 0; c < there; ++c) {
                T* to = static_cast<T*>(call.grad_rows) + row * call.grad_by_batch +
                        (m * call.chunk_size + numbers[c]) * call.grad_by_step;
                combine<T, T>(to, 0, 1, &share, 0, 0, &source, 0, 1, dim);
            }
        }
    });
}

}  // namespace
