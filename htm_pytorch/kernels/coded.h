// Keep the k best chunks of each query by codes: to the last bit as without.

#pragma once

#include "best.h"
#include "codes.h"

namespace {

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
constexpr float kLeast = 1e-33f;  // of what a product of codes is multiplied with
constexpr int64_t kMostLooks = 4;  // one chunk in so many; where more are looked at, codes do not pay
constexpr int64_t kFewest = 8;    // of them, from which on the best is looked for first

inline float magnitude_of(float x) { return x < 0 ? -x : x; }

// Summaries that are not here: a look finds closer bounds, by finer codes.
struct Absent {};

// Chunks that may be among the best of a query, as far as closer bounds say.
struct Candidates {
    int64_t* chunks;
    float *upper, *lower;
    int64_t count, room;
    bool is_short;  // there were more than there is room for

    void add(int64_t chunk, float most, float least, float mark) {
        if (count == room) drop(mark);
        if (count == room) {
            is_short = true;
            return;
        }
        chunks[count] = chunk;
        upper[count] = most;
        lower[count++] = least;
    }

    void drop(float mark) {
        int64_t left = 0;
        for (int64_t i = 0; i < count; ++i) {
            if (upper[i] < mark) continue;
            chunks[left] = chunks[i];
            upper[left] = upper[i];
            lower[left++] = lower[i];
        }
        count = left;
    }
};

// What a query knows while it goes through codes.
struct Seeking {
    Asked asked;
    Best<float>* best;  // of the chunks that were looked at; of absent ones, the least they are worth
    Candidates* near;         // of absent ones, all that may be kept
    Best<float> least;  // what k chunks are worth at least
    float hint;         // so is this, but by chunks that may come later

    // No chunk that is worth less is kept; NaN: every one may be.
    float mark() const {
        const float known = least.threshold();
        const float most = known != known || known < hint ? hint : known;
        const float seen = near ? best->threshold() : most;
        return seen > most ? seen : most;
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
            const Vector<float> scales = load<float>(codes.scales + at + c);
            const Vector<float> steps = scales * asked.step;
            const Vector<float> about =
                base + __builtin_convertvector(whole, Vector<float>) * steps;
            const Vector<float> sizes = load<float>(codes.sizes + at + c);
            const Vector<float> errors = load<float>(codes.errors + at + c) * asked.length;
            const Vector<float> off = errors + sizes * asked.rest + asked.lost;
            // What may have become too large, or nothing, says nothing.
            const Mask<float> known =
                (errors + sizes * asked.length < kLongest) &
                ((steps > kLeast) | (scales == 0) | (splat(asked.step) == 0));
            const Vector<float> unknown = splat(__builtin_nanf(""));
            store(upper + c, choose<float>(known, about + off, unknown));
            store(lower + c, choose<float>(known, about - off, unknown));
        }
    }

    // Make bounds of scores of those of products; false where `count` chunks are all below `mark`.
    bool fade(const Fading<float>& fading, const int64_t* chunks, int64_t count, float mark) {
        float loss[kBlock] = {};
        for (int64_t c = 0; c < count; ++c) {
            loss[c] = magnitude_of(fading.decay * fading.fading[chunks[c]]);
        }
        auto slack = [&](const float* score, int64_t c) __attribute__((always_inline)) {
            const Vector<float> size = magnitude(load<float>(score + c));
            return 0x1p-20f * (1 + size + 2 * load<float>(loss + c));
        };
        float most[kBlock];
        Mask<float> pass = {};
        for (int64_t c = 0; c < kBlock; c += lanes<float>) {
            const Vector<float> lost = load<float>(loss + c);
            // Fading may also raise: then by as much.
            const Vector<float> raised = fading.decay < 0 ? lost : -lost;
            store(most + c, fading.bent(load<float>(upper + c), Vector<float>{}) + raised);
            pass |= ~(load<float>(most + c) + slack(most, c) < mark);
        }
        if (!__builtin_reduce_or(pass)) return false;
        fading.score(upper, chunks, count, __builtin_nanf(""));
        fading.score(lower, chunks, count, __builtin_nanf(""));
        for (int64_t c = 0; c < kBlock; c += lanes<float>) {
            store(upper + c, load<float>(upper + c) + slack(upper, c));
            store(lower + c, load<float>(lower + c) - slack(lower, c));
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
    int64_t window_start = 0, looks = 0;
    bool is_seen[kWindow];

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

    // Whether any of the queries [q, q + rows) sees any of `some` chunks from m on.
    bool any_sees(int64_t q, int64_t rows, int64_t m, int64_t some) const {
        uint8_t any = !valid;
        for (int64_t c = m; valid && c < m + some; ++c) any |= valid[c];
        if (!any || !mask) return any;
        any = 0;
        for (int64_t r = q; r < q + rows && !any; ++r) {
            const uint8_t* seen = mask + r * call.chunk_mask_by_query + m;
            for (int64_t c = 0; c < some; ++c) any |= seen[c];
        }
        return any;
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
                if (base[s] > base[most] || base[most] != base[most]) most = s;
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
        looks += some;
        if constexpr (same<S, Absent>) {
            look_closer(q, chunks, some);
        } else {
            look_at_summaries(q, chunks, some);
        }
    }

    // By both parts of the codes.
    void look_closer(int64_t q, const int64_t* chunks, int64_t some) {
        Seeking& mine = seeking[q];
        const int64_t dim = call.dim, terms = memory_row * codes.terms_by_batch;
        const float* one = route + q * dim;
        Bounds bounds = {};
        for (int64_t c = 0; c < some; ++c) {
            const int64_t m = chunks[c], at = memory_row * codes.by_batch + m * codes.width;
            Vector<float> total = {};
            auto add = [&](int64_t d, Vector<float> asked) __attribute__((always_inline)) {
                total += asked * (load<float>(codes.coarse + at + d) - float(kZero));
                total += asked * ((load<float>(codes.fine + at + d) - float(kZero)) * (1.0f / kFine));
            };
            int64_t d = 0;
            for (; d + lanes<float> <= dim; d += lanes<float>) add(d, load<float>(one + d));
            if (d < dim) add(d, load<float>(one + d, dim - d));
            const float about = bases[q * kWindow + (m - window_start) / kStretch] +
                                codes.scales[terms + m] * sum<float>(total);
            const float error = codes.fine_errors[terms + m] * mine.asked.length;
            const float off = error + mine.asked.lost;
            const bool known = error + codes.sizes[terms + m] * mine.asked.length < kLongest;
            bounds.upper[c] = known ? about + off : __builtin_nanf("");
            bounds.lower[c] = known ? about - off : __builtin_nanf("");
        }
        if (call.ceiling) {
            bounds.fade(Fading<float>(call, row, first + q), chunks, some, __builtin_nanf(""));
        }
        for (int64_t c = 0; c < some; ++c) {
            if (bounds.lower[c] == bounds.lower[c]) mine.best->add(bounds.lower[c], chunks[c]);
            mine.near->add(chunks[c], bounds.upper[c], bounds.lower[c], mine.mark());
        }
    }

    void look_at_summaries(int64_t q, const int64_t* chunks, int64_t some) {
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
            const float most = bases[r * kWindow + s] + mine.asked.length * radius + mine.asked.lost;
            if (!(most < kLongest)) return false;
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
                const bool far = !is_seen[s] || is_far(q, rows, s, radii[s]);
                for (int64_t m = from; m < to; m += kBlock) {
                    const int64_t some = to - m < kBlock ? to - m : kBlock;
                    for (int64_t c = 0; c < some; ++c) chunks[c] = m + c;
                    float* upper = uppers + q * kPart * kStretch + m - begin;
                    if (far || !any_sees(q, rows, m, some)) {
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

    // Go through kWindow stretches, from that of chunk `start` on. Returns where it stopped, since
    // codes told next to nothing.
    int64_t window(int64_t start, int64_t end, const float** centres, Best<float> room) {
        window_start = start;
        const int64_t begin = start / kStretch, stretches = (end - start + kStretch - 1) / kStretch;
        const float* radii = codes.radii + memory_row * codes.radii_by_batch + begin;
        int64_t numbers[kWindow], seen = 0;
        for (int64_t s = 0; s < stretches; ++s) {
            const int64_t from = start + s * kStretch;
            const int64_t some = end - from < kStretch ? end - from : kStretch;
            is_seen[s] = any_sees(0, count, from, some);
            if (!is_seen[s]) continue;
            numbers[seen] = s;
            centres[seen++] =
                codes.centres + memory_row * codes.centres_by_batch + (begin + s) * call.dim;
        }
        if (!seen) return end;
        products<float, float>(route, call.dim, count, centres, seen, call.dim, bases, kWindow);
        for (int64_t q = 0; q < count; ++q) {
            // Behind each other at first, then each where its stretch is.
            float* base = bases + q * kWindow;
            for (int64_t j = seen - 1, s = stretches - 1; s >= 0; --s) {
                const bool is_next = j >= 0 && numbers[j] == s;
                const float product = is_next ? base[j--] : -__builtin_inff();
                base[s] = is_next && !(magnitude_of(product) < kLongest) ? __builtin_nanf("") : product;
            }
        }
        if (stretches >= kFewest) give_hints(start, end, stretches, room);
        for (int64_t s = 0; s < stretches; s += kPart) {
            int64_t stop = start + (s + kPart) * kStretch;
            if (stop > end) stop = end;
            const int64_t before = looks;
            part(start, stop, s, radii);
            const int64_t asked = (stop - start - s * kStretch) * count;
            if (!same<S, Absent> && kMostLooks * (looks - before) > asked) return stop;
        }
        return end;
    }
};

// Returns where it stopped: the rest is to be picked without.
template <class S>
int64_t pick_coded(Call& call, int64_t row, int64_t first, int64_t last, int64_t begin, int64_t end,
                Best<float>* best, Candidates* near = nullptr) {
    const int64_t count = last - first, width = call.codes.width, k = call.k;
    Scratch<int8_t> code(count * width);
    Scratch<Seeking> seeking(count);
    Scratch<float> bases(count * kWindow), uppers(count * kPart * kStretch), scores((count + 1) * k);
    Scratch<const float*> centres(kWindow + kBlock);
    Scratch<int64_t> chunks((count + 1) * k);
    if (!got(call, code, seeking, bases, uppers, scores, centres, chunks)) return end;
    CodedPick<S> all(call, row, first, count, code, seeking, bases, uppers);
    for (int64_t q = 0; q < count; ++q) {
        seeking[q].asked = ask(all.route + q * call.dim, call.dim, width, code + q * width);
        seeking[q].best = best + q;
        seeking[q].near = near ? near + q : nullptr;
        seeking[q].least = {scores + q * k, chunks + q * k, 0, k};
        seeking[q].hint = -__builtin_inff();
    }
    const Best<float> room = {scores + count * k, chunks + count * k, 0, k};
    for (int64_t start = begin; start < end; start += kWindow * kStretch) {
        int64_t stop = start + kWindow * kStretch;
        if (stop > end) stop = end;
        const int64_t reached = all.window(start, stop, centres, room);
        if (reached < stop) return reached;
    }
    return end;
}

// All chunks that may be among the k best, as far as codes say, for summaries that are not here.
inline void seek(Seek& seek) {
    Call& call = seek.recall;
    const int64_t k = call.k, queries = call.queries, room = seek.room;
    const int64_t pairs = call.batch * queries;
    const int64_t blocks = (queries + kQueries - 1) / kQueries;
    const Segments parts(call, call.batch * blocks, kStretch);
    const int64_t segments = parts.count, each = parts.each;
    Scratch<float> scores(segments * pairs * k), upper(segments * pairs * room);
    Scratch<float> lower(segments * pairs * room);
    Scratch<int64_t> chunks(segments * pairs * k), found(segments * pairs * room);
    Scratch<Best<float>> best(segments * pairs);
    Scratch<Candidates> near(segments * pairs);
    if (!got(call, scores, upper, lower, chunks, found, best, near)) return;
    parallel(call, call.batch * blocks * segments, [&](int64_t begin, int64_t end) {
        for (int64_t item = begin; item < end; ++item) {
            const int64_t segment = item % segments, row = item / segments / blocks;
            const int64_t first = item / segments % blocks * kQueries;
            const int64_t last = first + kQueries < queries ? first + kQueries : queries;
            const int64_t start = segment * pairs + row * queries + first;
            for (int64_t x = start; x < start + last - first; ++x) {
                best[x] = {scores + x * k, chunks + x * k, 0, k};
                near[x] = {found + x * room, upper + x * room, lower + x * room, 0, room, false};
            }
            const int64_t from = segment * each;
            const int64_t to = from + each < call.chunks ? from + each : call.chunks;
            pick_coded<Absent>(call, row, first, last, from, to, best + start, near + start);
        }
    });
    if (call.failed) return;
    seek.is_short = 0;
    for (int64_t x = 0; x < pairs; ++x) {
        Best<float>& all = best[x];
        Candidates whole = {seek.found + x * room, seek.upper + x * room, seek.lower + x * room, 0, room, false};
        for (int64_t segment = 1; segment < segments; ++segment) {
            const Best<float>& part = best[segment * pairs + x];
            for (int64_t j = 0; j < part.count; ++j) all.add(part.scores[j], part.chunks[j]);
        }
        const float mark = all.threshold();
        for (int64_t segment = 0; segment < segments; ++segment) {
            Candidates& part = near[segment * pairs + x];
            part.drop(mark);
            whole.is_short |= part.is_short;
            for (int64_t j = 0; j < part.count; ++j) {
                whole.add(part.chunks[j], part.upper[j], part.lower[j], mark);
            }
        }
        seek.is_short |= whole.is_short;
        for (int64_t j = whole.count; j < room; ++j) {
            whole.chunks[j] = -1;
            whole.upper[j] = whole.lower[j] = -__builtin_inff();
        }
    }
}

}  // namespace
