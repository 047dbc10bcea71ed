// Keep the k best chunks of each query, and the way back to route and summaries.

#pragma once

#include "codes.h"

namespace {

constexpr int64_t kSegment = 64;  // chunks that are worth a thread's while
constexpr int64_t kBlock = 16;    // chunks scored at a time: their summaries fit the nearest cache
constexpr double kLeak = 0x1p-10;  // of products above a ceiling
constexpr int64_t kQueries = 64;  // queries that read the summaries together

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

// The products of one row with few others, each as `products` gives it.
template <class T, class S>
void few_products(const T* left, const S** right, int64_t count, int64_t width, T* out) {
    auto sweep = [&](auto number, int64_t from) __attribute__((always_inline)) {
        constexpr int C = sizeof(number);
        Vector<T> total[C] = {};
        int64_t d = 0;
        for (; d + lanes<T> <= width; d += lanes<T>) {
            const Vector<T> row = load<T>(left + d);
#pragma unroll
            for (int c = 0; c < C; ++c) total[c] += row * load<T>(right[from + c] + d);
        }
        if (d < width) {
            const Vector<T> row = load<T>(left + d, width - d);
#pragma unroll
            for (int c = 0; c < C; ++c) total[c] += row * load<T>(right[from + c] + d, width - d);
        }
        for (int c = 0; c < C; ++c) out[from + c] = sum<T>(total[c]);
    };
    int64_t c = 0;
    for (; c + 4 <= count; c += 4) sweep(int32_t(), c);
    for (; c < count; ++c) sweep(int8_t(), c);
}

constexpr int64_t kWindow = 256;  // stretches whose centres are compared at a time
constexpr int64_t kPart = 32;     // of them, stretches that are gone through before any look
constexpr int64_t kFewest = 8;    // of them, from which on the best is looked for first

inline float magnitude_of(float x) { return x < 0 ? -x : x; }

// What a query knows while it goes through codes.
struct Seeking {
    Asked asked;
    Best<float>* best;  // of the chunks that were looked at
    Best<float> least;  // what k chunks are worth at least
    float hint;         // so is this, but by chunks that may come later

    // No chunk that is worth less is kept; NaN: every one may be.
    float mark() const {
        const float known = least.threshold();
        return known != known || known < hint ? hint : known;
    }
};

// What codes say of kBlock chunks: products are not more than `upper` and not less than `lower`;
// where nothing can be said, they are no numbers.
struct Bounds {
    float upper[kBlock], lower[kBlock];

    void find(const Codes& codes, int64_t at, const Asked& asked, float base,
              const int32_t* product) {
        for (int64_t c = 0; c < kBlock; c += lanes<float>) {
            Vector<int32_t> whole;
            memcpy(&whole, product + c, sizeof whole);
            whole -= asked.zero;
            const Vector<float> about = base + __builtin_convertvector(whole, Vector<float>) *
                                                   (load<float>(codes.scales + at + c) * asked.step);
            const Vector<float> sizes = load<float>(codes.sizes + at + c);
            const Vector<float> off =
                load<float>(codes.errors + at + c) * asked.length + sizes * asked.rest;
            // What may have overflowed says nothing.
            const Mask<float> known = sizes * asked.length < kLongest;
            const Vector<float> unknown = splat(__builtin_nanf(""));
            store(upper + c, choose<float>(known, about + off, unknown));
            store(lower + c, choose<float>(known, about - off, unknown));
        }
    }

    // Make bounds of scores of those of products; false where `count` chunks are all below `mark`.
    bool fade(const Fading<float>& fading, const int64_t* chunks, int64_t count, float mark) {
        if (!fading.score(upper, chunks, count, mark - 1e-5f * magnitude_of(mark))) return false;
        fading.score(lower, chunks, count, __builtin_nanf(""));
        for (int64_t c = 0; c < count; ++c) {
            const float loss = 2 * magnitude_of(fading.decay * fading.fading[chunks[c]]);
            upper[c] += 0x1p-20f * (1 + magnitude_of(upper[c]) + loss);
            lower[c] -= 0x1p-20f * (1 + magnitude_of(lower[c]) + loss);
        }
        return true;
    }
};

// Keep the best of some chunks for queries of one row, as `pick_segment` does and to the last bit,
// by codes: summaries are read where codes do not say that a chunk is not among the best.
template <class S>
struct CodedPick {
    Call& call;
    const Codes& codes;
    int64_t row, first, count;  // queries [first, first + count) of a row
    const float* route;
    const int8_t* code;
    Seeking* seeking;
    float* bases;   // [count, kWindow], of the products with centres
    float* uppers;  // [count, kPart * kStretch]
    int64_t memory_row;
    const uint8_t *valid, *mask, *coarse;

    CodedPick(Call& call, int64_t row, int64_t first, int64_t count, const int8_t* code,
              Seeking* seeking, float* bases, float* uppers)
        : call(call),
          codes(call.codes),
          row(row),
          first(first),
          count(count),
          route(static_cast<const float*>(call.route) + (row * call.queries + first) * call.dim),
          code(code),
          seeking(seeking),
          bases(bases),
          uppers(uppers),
          memory_row(call.memory_batch == 1 ? 0 : row),
          valid(call.valid ? call.valid + memory_row * call.valid_by_batch : nullptr),
          mask(call.chunk_mask ? call.chunk_mask + row * call.chunk_mask_by_batch +
                                     first * call.chunk_mask_by_query
                               : nullptr),
          coarse(call.codes.coarse + memory_row * call.codes.by_batch) {}

    bool sees(int64_t q, int64_t chunk) const {
        return (!valid || valid[chunk]) && (!mask || mask[q * call.chunk_mask_by_query + chunk]);
    }

    // Bounds of `some` chunks from m on; false where all are below `mark`.
    bool bound(int64_t q, const int32_t* product, float base, int64_t m, int64_t some,
               const int64_t* chunks, float mark, Bounds& bounds) const {
        bounds.find(codes, memory_row * codes.terms_by_batch + m, seeking[q].asked, base, product);
        if (!call.ceiling) return true;
        return bounds.fade(Fading<float>(call, row, first + q), chunks, some, mark);
    }

    void add_lower(int64_t q, const Bounds& bounds, int64_t m, int64_t some, Best<float>& least) const {
        for (int64_t c = 0; c < some; ++c) {
            if (bounds.lower[c] == bounds.lower[c] && sees(q, m + c)) least.add(bounds.lower[c], m + c);
        }
    }

    // A hint for each query, from the stretch whose centre lies best for it.
    void give_hints(int64_t start, int64_t end, int64_t stretches, Best<float> room) {
        int32_t product[4 * kBlock];
        int64_t chunks[kBlock];
        for (int64_t q = 0; q < count; ++q) {
            const float* base = bases + q * kWindow;
            room.count = 0;
            int64_t most = 0;
            for (int64_t s = 1; s < stretches; ++s) {
                if (base[s] > base[most]) most = s;
            }
            const int64_t from = start + most * kStretch;
            for (int64_t m = from; m < from + kStretch && m < end; m += kBlock) {
                const int64_t some = end - m < kBlock ? end - m : kBlock;
                for (int64_t c = 0; c < some; ++c) chunks[c] = m + c;
                code_products(code + q * codes.width, 1, coarse + m * codes.width, kBlock, codes.width,
                              0, product, kBlock);
                Bounds bounds;
                bound(q, product, base[most], m, some, chunks, __builtin_nanf(""), bounds);
                add_lower(q, bounds, m, some, room);
            }
            const float least = room.threshold();
            if (least > seeking[q].hint) seeking[q].hint = least;
        }
    }

    // Write down what chunks may be worth.
    void note(int64_t q, const int32_t* product, float base, int64_t m, int64_t some,
              const int64_t* chunks, float* upper) {
        Seeking& mine = seeking[q];
        Bounds bounds;
        if (!bound(q, product, base, m, some, chunks, mine.mark(), bounds)) return none(upper);
        memcpy(upper, bounds.upper, sizeof bounds.upper);
        const float known = mine.least.threshold();
        Mask<float> higher = {};
        for (int64_t c = 0; c < kBlock; c += lanes<float>) {
            higher |= ~(load<float>(bounds.lower + c) <= known);
        }
        if (__builtin_reduce_or(higher)) add_lower(q, bounds, m, some, mine.least);
    }

    static void none(float* upper) {
        for (int64_t c = 0; c < kBlock; ++c) upper[c] = -__builtin_inff();
    }

    // Look at the chunks [from, to) that may be among the best.
    void look(int64_t q, int64_t from, int64_t to) {
        Seeking& mine = seeking[q];
        const float mark = mine.mark();
        const float* upper = uppers + q * kPart * kStretch;
        int64_t waiting[kBlock], count_waiting = 0;
        for (int64_t m = from; m < to; m += kBlock) {
            // Of equals the first to come stays.
            const float kept = mine.best->threshold();
            Mask<float> near = {};
            for (int64_t c = 0; c < kBlock; c += lanes<float>) {
                const Vector<float> most = load<float>(upper + m - from + c);
                near |= ~((most < mark) | (most <= kept));
            }
            if (!__builtin_reduce_or(near)) continue;
            for (int64_t c = m; c < m + kBlock && c < to; ++c) {
                const float most = upper[c - from];
                if (most < mark || most <= kept || !sees(q, c)) continue;
                waiting[count_waiting++] = c;
                if (count_waiting == kBlock) look_at(q, waiting, count_waiting), count_waiting = 0;
            }
        }
        look_at(q, waiting, count_waiting);
    }

    void look_at(int64_t q, const int64_t* chunks, int64_t some) {
        const S* summaries = static_cast<const S*>(call.summaries) + memory_row * call.summaries_by_batch;
        const S* rows[kBlock];
        float scores[kBlock] = {};
        for (int64_t c = 0; c < some; ++c) rows[c] = summaries + chunks[c] * call.summaries_by_chunk;
        few_products<float, S>(route + q * call.dim, rows, some, call.dim, scores);
        if (call.ceiling) {
            Fading<float>(call, row, first + q).score(scores, chunks, some, __builtin_nanf(""));
        }
        for (int64_t c = 0; c < some; ++c) seeking[q].best->add(scores[c], chunks[c]);
    }

    // Whether none of the queries [q, q + rows) keeps a chunk of the stretch, by its centre alone.
    bool is_far(int64_t q, int64_t rows, int64_t s, float radius) const {
        if (call.ceiling) return false;
        for (int64_t r = q; r < q + rows; ++r) {
            const Seeking& mine = seeking[r];
            const float most = bases[r * kWindow + s] + mine.asked.length * radius;
            if (!(most < mine.mark() || most <= mine.best->threshold())) return false;
        }
        return true;
    }

    // Go through kPart stretches, of which s is the number in the window that begins at `start`.
    void part(int64_t start, int64_t end, int64_t s, const float* radii) {
        const int64_t begin = start + s * kStretch;
        int32_t product[4 * kBlock];
        int64_t chunks[kBlock];
        for (int64_t from = begin; from < end; from += kStretch, ++s) {
            const int64_t to = from + kStretch < end ? from + kStretch : end;
            for (int64_t q = 0; q < count; q += 4) {
                const int64_t rows = count - q < 4 ? count - q : 4;
                const bool far = is_far(q, rows, s, radii[s]);
                for (int64_t m = from; m < to; m += kBlock) {
                    const int64_t some = to - m < kBlock ? to - m : kBlock;
                    bool any = !valid;
                    for (int64_t c = 0; c < some; ++c) {
                        chunks[c] = m + c;
                        any |= valid && valid[m + c];
                    }
                    float* upper = uppers + q * kPart * kStretch + m - begin;
                    if (far || !any) {
                        for (int64_t r = 0; r < rows; ++r) none(upper + r * kPart * kStretch);
                        continue;
                    }
                    code_products(code + q * codes.width, rows, coarse + m * codes.width, kBlock,
                                  codes.width, q ? 0 : kBlock * codes.width, product, kBlock);
                    for (int64_t r = 0; r < rows; ++r) {
                        note(q + r, product + r * kBlock, bases[(q + r) * kWindow + s], m, some, chunks,
                             upper + r * kPart * kStretch);
                    }
                }
            }
        }
        for (int64_t q = 0; q < count; ++q) look(q, begin, end);
    }

    // Go through kWindow stretches, from that of chunk `start` on.
    void window(int64_t start, int64_t end, const float** centres, Best<float> room) {
        const int64_t begin = start / kStretch, stretches = (end - start + kStretch - 1) / kStretch;
        const float* radii = codes.radii + memory_row * codes.radii_by_batch + begin;
        for (int64_t s = 0; s < stretches; ++s) {
            centres[s] = codes.centres + memory_row * codes.centres_by_batch + (begin + s) * call.dim;
        }
        products<float, float>(route, call.dim, count, centres, stretches, call.dim, bases, kWindow);
        for (int64_t q = 0; q < count; ++q) {
            for (int64_t s = 0; s < stretches; ++s) {
                float& base = bases[q * kWindow + s];
                if (!(magnitude_of(base) < kLongest)) base = __builtin_nanf("");
            }
        }
        if (stretches >= kFewest) give_hints(start, end, stretches, room);
        for (int64_t s = 0; s < stretches; s += kPart) {
            const int64_t stop = start + (s + kPart) * kStretch;
            part(start, stop < end ? stop : end, s, radii);
        }
    }
};

template <class S>
void pick_coded(Call& call, int64_t row, int64_t first, int64_t last, int64_t begin, int64_t end,
                Best<float>* best) {
    const int64_t count = last - first, width = call.codes.width, k = call.k;
    Scratch<int8_t> code(count * width);
    Scratch<Seeking> seeking(count);
    Scratch<float> bases(count * kWindow), uppers(count * kPart * kStretch), scores((count + 1) * k);
    Scratch<const float*> centres(kWindow + kBlock);
    Scratch<int64_t> chunks((count + 1) * k);
    if (!got(call, code, seeking, bases, uppers, scores, centres, chunks)) return;
    CodedPick<S> all(call, row, first, count, code, seeking, bases, uppers);
    for (int64_t q = 0; q < count; ++q) {
        seeking[q].asked = ask(all.route + q * call.dim, call.dim, width, code + q * width);
        seeking[q].best = best + q;
        seeking[q].least = {scores + q * k, chunks + q * k, 0, k};
        seeking[q].hint = -__builtin_inff();
    }
    const Best<float> room = {scores + count * k, chunks + count * k, 0, k};
    for (int64_t start = begin; start < end; start += kWindow * kStretch) {
        const int64_t stop = start + kWindow * kStretch;
        all.window(start, stop < end ? stop : end, centres, room);
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
    int64_t segments = (call.threads + call.batch * blocks - 1) / (call.batch * blocks);
    const int64_t most = call.chunks / kSegment;
    if (segments > most) segments = most;
    if (segments < 1 || call.threads == 1) segments = 1;
    int64_t each = (call.chunks + segments - 1) / segments;
    if (call.codes.coarse) each = (each + kStretch - 1) / kStretch * kStretch;
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
            const int64_t from = segment * each;
            const int64_t to = from + each < call.chunks ? from + each : call.chunks;
            if constexpr (same<T, float>) {
                if (call.codes.coarse) {
                    pick_coded<S>(call, row, first, last, from, to, best + start);
                    continue;
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
