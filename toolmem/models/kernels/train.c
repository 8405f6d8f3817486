/* All blocks of a small plain Transformer forward and backward, in float32: part of kernels.c, called by
 * models/fused_training.py, where the shapes and what is supported are told.
 *
 * A vector's lanes are rows of the batch: activations lie as [feature][position][lane], and the code is that of
 * one sequence, a number being LANES of them. Softmax, convolution and rotation are then as plainly vectorised
 * as the products, whose weights are broadcast; nothing is padded to a head's width. Positions go by blocks of
 * POSITIONS; those added to a row's end are zeros, of which nothing learns. A feature's positions lie `s` vectors
 * apart from the next one's.
 */

#define POSITIONS 4 /* a block's */
#if LANES == 16
#define HALVES 1 /* how often a block is taken in part, so that the sums fit the registers */
#else
#define HALVES 2
#endif
#define PART (POSITIONS / HALVES)

#if defined(__AVX512F__)
ALWAYS vec square_root(vec x) { return (vec)_mm512_sqrt_ps((__m512)x); }
#elif defined(__AVX__)
ALWAYS vec square_root(vec x) { return (vec)_mm256_sqrt_ps((__m256)x); }
#else
ALWAYS vec square_root(vec x) {
    for (int i = 0; i < LANES; i++) x[i] = sqrtf(x[i]);
    return x;
}
#endif

typedef int32_t mask_of __attribute__((vector_size(4 * LANES)));

ALWAYS vec all(float x) { return (vec){0} + x; }
ALWAYS vec choose(mask_of mask, vec yes, vec no) { return (vec)(((mask_of)yes & mask) | ((mask_of)no & ~mask)); }
ALWAYS vec larger(vec a, vec b) { return choose(a > b, a, b); }
ALWAYS vec minus_abs(vec x) { return (vec)((mask_of)x | ((mask_of){0} + INT32_MIN)); }

typedef struct {
    long batch, seq, layers, dim, heads, kv_heads, head_dim, rotary_dim, hidden, kind, conv, residual, threads;
} train_shape;

/* Parameters of a layer in the order of their gradients; NULL for what it has not. */
typedef struct {
    const float *mixer_norm, *mixer_taps, *qkv, *taps, *out, *feed_norm, *feed_taps, *up, *down;
    float mixer_eps, feed_eps, scale;
    long rope;
} train_layer;

typedef struct {
    long mixer_norm, mixer_taps, qkv, taps, out, feed_norm, feed_taps, up, down, layer;
} train_grads;

/* What the forward pass leaves a layer's backward pass, as first features in a group's room. */
typedef struct {
    long x, factor, normed, mixed, before, qkv, largest, inverse, out, y, feed_factor, feed_normed, feed_mixed, active,
        slope, layer;
} train_kept;

typedef struct {
    const train_shape *t;
    long channels, up, s, padded, groups;
    train_grads g;
    train_kept k;
    long kept, scratch, grads; /* vectors of a group, vectors of a thread, numbers of all gradients */
} train_plan;

static train_plan plan_of(const train_shape *t) {
    train_plan a = {.t = t};
    a.channels = (t->heads + 2 * t->kv_heads) * t->head_dim;
    a.up = t->kind == SWIGLU ? 2 * t->hidden : t->hidden;
    a.padded = (t->seq + POSITIONS - 1) / POSITIONS * POSITIONS;
    /* an odd number of blocks, so that features do not all fall into the same few sets of a cache */
    a.s = POSITIONS * (a.padded / POSITIONS | 1);
    a.groups = (t->batch + LANES - 1) / LANES;
    long at = 0, inner = t->heads * t->head_dim;
#define NEXT_GRADS(NAME, SIZE) a.g.NAME = at, at += (SIZE)
    NEXT_GRADS(mixer_norm, t->dim);
    NEXT_GRADS(mixer_taps, t->residual * t->dim);
    NEXT_GRADS(qkv, a.channels * t->dim);
    NEXT_GRADS(taps, t->conv * a.channels);
    NEXT_GRADS(out, t->dim * inner);
    NEXT_GRADS(feed_norm, t->dim);
    NEXT_GRADS(feed_taps, t->residual * t->dim);
    NEXT_GRADS(up, a.up * t->dim);
    NEXT_GRADS(down, t->dim * t->hidden);
    a.g.layer = at;
    a.grads = at * t->layers + t->dim;
    at = 0;
#define NEXT_KEPT(NAME, SIZE) a.k.NAME = at, at += (SIZE)
    NEXT_KEPT(x, t->dim);
    NEXT_KEPT(factor, 1);
    NEXT_KEPT(normed, t->dim);
    NEXT_KEPT(mixed, t->residual ? t->dim : 0);
    NEXT_KEPT(before, t->conv ? a.channels : 0);
    NEXT_KEPT(qkv, a.channels);
    NEXT_KEPT(largest, t->heads);
    NEXT_KEPT(inverse, t->heads);
    NEXT_KEPT(out, inner);
    NEXT_KEPT(y, t->dim);
    NEXT_KEPT(feed_factor, 1);
    NEXT_KEPT(feed_normed, t->dim);
    NEXT_KEPT(feed_mixed, t->residual ? t->dim : 0);
    NEXT_KEPT(active, t->hidden);
    NEXT_KEPT(slope, a.up);
    a.k.layer = at;
    a.kept = (at * t->layers + t->dim + 1) * a.s; /* the last stream and its factor */
    /* forward: normed output and scores; backward: gradients of the stream, of what is normed, of its
     * gain, of both projections' outputs, of attention's output, and its products with the output */
    long wide = a.up > a.channels ? a.up : a.channels;
    a.scratch = (3 * t->dim + wide + inner + t->heads + POSITIONS) * a.s;
    return a;
}

/* Numbers of float that a pass wants as its room, and of all its gradients, threads apart. */
void train_sizes(const train_shape *t, long *room, long *grads) {
    train_plan a = plan_of(t);
    *room = (a.groups * a.kept + t->threads * a.scratch) * LANES;
    *grads = t->threads * a.grads;
}

/* ---- products */

/* R outputs of w x at PART positions. */
ALWAYS void product_tile(const float *w, long w_out, long w_in, long ins, const vec *x, vec *y, long s, const int add,
                         const int R) {
    vec sums[4][PART];
    UNROLL for (int r = 0; r < R; r++) UNROLL for (int p = 0; p < PART; p++)
        sums[r][p] = add ? y[r * s + p] : (vec){0};
    for (long i = 0; i < ins; i++) {
        vec numbers[PART];
        UNROLL for (int p = 0; p < PART; p++) numbers[p] = x[i * s + p];
        UNROLL for (int r = 0; r < R; r++) {
            vec weight = all(w[r * w_out + i * w_in]);
            UNROLL for (int p = 0; p < PART; p++) sums[r][p] = FMA(weight, numbers[p], sums[r][p]);
        }
    }
    UNROLL for (int r = 0; r < R; r++) UNROLL for (int p = 0; p < PART; p++) y[r * s + p] = sums[r][p];
}

/* y (+)= w x at a block of positions, w's numbers w_out apart from output to output and w_in from input to input. */
ALWAYS void product_of(const float *w, long w_out, long w_in, long outs, long ins, const vec *x, vec *y, long s,
                       const int add) {
    for (int half = 0; half < HALVES; half++, x += PART, y += PART) {
        long o = 0;
        for (; o + 4 <= outs; o += 4) product_tile(w + o * w_out, w_out, w_in, ins, x, y + o * s, s, add, 4);
        if (outs - o == 3) product_tile(w + o * w_out, w_out, w_in, ins, x, y + o * s, s, add, 3);
        else if (outs - o == 2) product_tile(w + o * w_out, w_out, w_in, ins, x, y + o * s, s, add, 2);
        else if (outs - o == 1) product_tile(w + o * w_out, w_out, w_in, ins, x, y + o * s, s, add, 1);
    }
}

/* y = w x, y += w x, y = w^T x, for w (outs, ins) of memory. */
static __attribute__((noinline)) void product(const float *w, long outs, long ins, const vec *x, vec *y, long s) {
    product_of(w, ins, 1, outs, ins, x, y, s, 0);
}
static __attribute__((noinline)) void add_product(const float *w, long outs, long ins, const vec *x, vec *y, long s) {
    product_of(w, ins, 1, outs, ins, x, y, s, 1);
}
static __attribute__((noinline)) void transposed(const float *w, long outs, long ins, const vec *x, vec *y, long s) {
    product_of(w, 1, ins, ins, outs, x, y, s, 0);
}

/* O x I numbers of a weight's gradient: dy x^T summed over n positions and all lanes. */
ALWAYS void outer_tile(const vec *dy, const vec *x, long s, long n, float *grads, long ins, const int O, const int I) {
    vec sums[4][4];
    UNROLL for (int o = 0; o < O; o++) UNROLL for (int i = 0; i < I; i++) sums[o][i] = (vec){0};
    for (long p = 0; p < n; p++) {
        vec right[4];
        UNROLL for (int i = 0; i < I; i++) right[i] = x[i * s + p];
        UNROLL for (int o = 0; o < O; o++) {
            vec left = dy[o * s + p];
            IN_REGISTER(left);
            UNROLL for (int i = 0; i < I; i++) sums[o][i] = FMA(left, right[i], sums[o][i]);
        }
    }
    UNROLL for (int o = 0; o < O; o++) {
        UNROLL for (int i = I; i < 4; i++) sums[o][i] = (vec){0};
        four added = sum_four(sums[o][0], sums[o][1], sums[o][2], sums[o][3]);
        UNROLL for (int i = 0; i < I; i++) grads[o * ins + i] += added[i];
    }
}

#if LANES == 16
#define INPUTS 4
#else
#define INPUTS 2
#endif

/* grads (outs, ins) += dy x^T */
static __attribute__((noinline)) void outer(const vec *dy, long outs, const vec *x, long ins, long s, long n,
                                            float *grads) {
    long i = 0;
    for (; i + INPUTS <= ins; i += INPUTS) {
        long o = 0;
        for (; o + 4 <= outs; o += 4) outer_tile(dy + o * s, x + i * s, s, n, grads + o * ins + i, ins, 4, INPUTS);
        for (; o < outs; o++) outer_tile(dy + o * s, x + i * s, s, n, grads + o * ins + i, ins, 1, INPUTS);
    }
    for (; i < ins; i++) {
        long o = 0;
        for (; o + 4 <= outs; o += 4) outer_tile(dy + o * s, x + i * s, s, n, grads + o * ins + i, ins, 4, 1);
        for (; o < outs; o++) outer_tile(dy + o * s, x + i * s, s, n, grads + o * ins + i, ins, 1, 1);
    }
}

/* ---- norms */

/* A block: y = x * factor * gain, the factor kept. */
static void norm_block(const vec *x, const float *gain, float eps, long dim, long s, vec *factor, vec *y) {
    vec squares[POSITIONS] = {0};
    for (long c = 0; c < dim; c++)
        UNROLL for (int p = 0; p < POSITIONS; p++) squares[p] = FMA(x[c * s + p], x[c * s + p], squares[p]);
    UNROLL for (int p = 0; p < POSITIONS; p++) factor[p] = 1.0f / square_root(squares[p] / (float)dim + eps);
    for (long c = 0; c < dim; c++)
        UNROLL for (int p = 0; p < POSITIONS; p++) y[c * s + p] = x[c * s + p] * factor[p] * gain[c];
}

/* dx (+)= what comes through a norm from dy; gains takes the gain's gradients, each lane apart. */
static __attribute__((noinline)) void norm_back(const vec *dy, const vec *x, const vec *factor, const float *gain,
                                                long dim, long s, long n, int add, vec *dx, float *gains) {
    for (long at = 0; at < n; at += POSITIONS) {
        vec mean[POSITIONS] = {0};
        for (long c = 0; c < dim; c++)
            UNROLL for (int p = 0; p < POSITIONS; p++) {
                long here = c * s + at + p;
                mean[p] = FMA(dy[here] * gain[c], x[here], mean[p]);
            }
        /* of the gradient and x times the factor, times the factor squared */
        UNROLL for (int p = 0; p < POSITIONS; p++) {
            vec f = factor[at + p];
            mean[p] *= f * f * f / (float)dim;
        }
        for (long c = 0; c < dim; c++)
            UNROLL for (int p = 0; p < POSITIONS; p++) {
                long here = c * s + at + p;
                vec d = factor[at + p] * gain[c] * dy[here] - x[here] * mean[p];
                dx[here] = add ? dx[here] + d : d;
            }
    }
    for (long c = 0; c < dim; c++) {
        vec sums[POSITIONS] = {0};
        for (long at = 0; at < n; at += POSITIONS)
            UNROLL for (int p = 0; p < POSITIONS; p++) {
                long here = c * s + at + p;
                sums[p] = FMA(dy[here] * factor[at + p], x[here], sums[p]);
            }
        gains[c] += sum_lanes((sums[0] + sums[1]) + (sums[2] + sums[3]));
    }
}

/* ---- short convolutions */

/* A block at position `at`: y = x + taps * x. */
static void convolve_block(const vec *x, const float *taps, long width, long channels, long s, long at, vec *y) {
    for (long c = 0; c < channels; c++) {
        const vec *from = x + c * s + at;
        vec *to = y + c * s + at;
        vec first = all(1.0f + taps[c]);
        UNROLL for (int p = 0; p < POSITIONS; p++) to[p] = from[p] * first;
        if (width == 4 && at) {
            UNROLL for (int j = 1; j < 4; j++) {
                vec tap = all(taps[j * channels + c]);
                UNROLL for (int p = 0; p < POSITIONS; p++) to[p] = FMA(tap, from[p - j], to[p]);
            }
        } else
            for (long j = 1; j < width; j++)
                for (long p = 0; p < POSITIONS; p++)
                    if (at + p >= j) to[p] = FMA(all(taps[j * channels + c]), from[p - j], to[p]);
    }
}

/* dy becomes the gradient of the convolution's input x; grads (width, channels) += the taps'. */
static __attribute__((noinline)) void convolve_back(vec *dy, const vec *x, const float *taps, long width,
                                                    long channels, long s, long n, float *grads) {
    for (long c = 0; c < channels; c++) {
        vec *d = dy + c * s;
        const vec *from = x + c * s;
        for (long j = 0; j < width; j++) {
            vec sums[2] = {0};
            long p = j;
            for (; p + 2 <= n; p += 2) {
                sums[0] = FMA(d[p], from[p - j], sums[0]);
                sums[1] = FMA(d[p + 1], from[p + 1 - j], sums[1]);
            }
            if (p < n) sums[0] = FMA(d[p], from[p - j], sums[0]);
            grads[j * channels + c] += sum_lanes(sums[0] + sums[1]);
        }
        vec first = all(1.0f + taps[c]);
        long p = 0;
        if (width == 4) {
            vec one = all(taps[channels + c]), two = all(taps[2 * channels + c]), three = all(taps[3 * channels + c]);
            for (; p + 3 < n; p++)
                d[p] = FMA(three, d[p + 3], FMA(two, d[p + 2], FMA(one, d[p + 1], d[p] * first)));
        }
        for (; p < n; p++) {
            vec sum = d[p] * first;
            for (long j = 1; j < width && p + j < n; j++) sum = FMA(all(taps[j * channels + c]), d[p + j], sum);
            d[p] = sum;
        }
    }
}

/* ---- attention */

/* A block of heads turned by their positions and multiplied by a factor, in place; `back` turns the other way. */
static void rotate_block(vec *x, long heads, long d, const float *cosines, const float *sines, long width, long seq,
                         long s, long at, float factor, const int back) {
    long half = width / 2;
    for (long head = 0; head < heads; head++, x += d * s) {
        for (long c = 0; c < half; c++)
            UNROLL for (int p = 0; p < POSITIONS; p++) {
                long place = (at + p < seq ? at + p : seq - 1) * width + c;
                vec *first = x + c * s + p, *second = first + half * s, a = *first, b = *second;
                /* of b into the first, of a into the second */
                float from_b = back ? sines[place + half] : sines[place], from_a = back ? sines[place] : sines[place + half];
                *first = FMA(b, all(factor * from_b), a * (factor * cosines[place]));
                *second = FMA(a, all(factor * from_a), b * (factor * cosines[place + half]));
            }
        if (factor != 1.0f)
            for (long c = width; c < d; c++) UNROLL for (int p = 0; p < POSITIONS; p++) x[c * s + p] *= factor;
    }
}

/* Products of PART queries and POSITIONS keys over d channels. */
ALWAYS void scores_tile(const vec *queries, const vec *keys, long d, long s, vec sums[POSITIONS][PART]) {
    UNROLL for (int j = 0; j < POSITIONS; j++) UNROLL for (int p = 0; p < PART; p++) sums[j][p] = (vec){0};
    for (long c = 0; c < d; c++) {
        vec query[PART];
        UNROLL for (int p = 0; p < PART; p++) query[p] = queries[c * s + p];
        UNROLL for (int j = 0; j < POSITIONS; j++) {
            vec key = keys[c * s + j];
            IN_REGISTER(key);
            UNROLL for (int p = 0; p < PART; p++) sums[j][p] = FMA(key, query[p], sums[j][p]);
        }
    }
}

/* R channels of the means of n values, PART queries. */
ALWAYS void means_tile(const vec *scores, const vec *values, long n, long s, const vec *inverse, vec *y, const int R) {
    vec sums[4][PART];
    UNROLL for (int r = 0; r < R; r++) UNROLL for (int p = 0; p < PART; p++) sums[r][p] = (vec){0};
    for (long j = 0; j < n; j++) {
        vec weight[PART];
        UNROLL for (int p = 0; p < PART; p++) weight[p] = scores[j * POSITIONS + p];
        UNROLL for (int r = 0; r < R; r++) {
            vec value = values[r * s + j];
            IN_REGISTER(value);
            UNROLL for (int p = 0; p < PART; p++) sums[r][p] = FMA(value, weight[p], sums[r][p]);
        }
    }
    UNROLL for (int r = 0; r < R; r++) UNROLL for (int p = 0; p < PART; p++) y[r * s + p] = sums[r][p] * inverse[p];
}

/* One head's block of queries at position `at` over all before; scores has room for POSITIONS * (at + POSITIONS). */
static __attribute__((noinline)) void attend_block(const vec *queries, const vec *keys, const vec *values, long d,
                                                   long s, long at, vec *scores, vec *largest, vec *inverse, vec *y) {
    long n = at + POSITIONS;
    for (int half = 0; half < HALVES; half++) {
        vec most[PART], sums[PART];
        UNROLL for (int p = 0; p < PART; p++) most[p] = all(-INFINITY), sums[p] = (vec){0};
        for (long first = 0; first < n; first += POSITIONS) {
            vec tile[POSITIONS][PART];
            scores_tile(queries + half * PART, keys + first, d, s, tile);
            UNROLL for (int j = 0; j < POSITIONS; j++) UNROLL for (int p = 0; p < PART; p++) {
                vec score = tile[j][p];
                if (first == at && j > half * PART + p) score = all(-INFINITY);
                most[p] = larger(score, most[p]);
                scores[(first + j) * POSITIONS + half * PART + p] = score;
            }
        }
        for (long j = 0; j < n; j++) UNROLL for (int p = 0; p < PART; p++) {
            vec *score = scores + j * POSITIONS + half * PART + p;
            vec e = exponential(*score - most[p]);
            sums[p] += e;
            *score = e;
        }
        UNROLL for (int p = 0; p < PART; p++) {
            largest[half * PART + p] = most[p];
            inverse[half * PART + p] = 1.0f / sums[p];
        }
        const vec *weights = scores + half * PART, *under = inverse + half * PART;
        vec *to = y + half * PART;
        long c = 0;
        for (; c + 4 <= d; c += 4) means_tile(weights, values + c * s, n, s, under, to + c * s, 4);
        for (; c + 2 <= d; c += 2) means_tile(weights, values + c * s, n, s, under, to + c * s, 2);
        for (; c < d; c++) means_tile(weights, values + c * s, n, s, under, to + c * s, 1);
    }
}

/* y (+)= tile x, of POSITIONS keys and PART queries; the sum over queries, or over keys. */
ALWAYS void add_to_keys(const vec tile[POSITIONS][PART], const vec *x, vec *y, long d, long s) {
    for (long c = 0; c < d; c++) {
        vec query[PART];
        UNROLL for (int p = 0; p < PART; p++) query[p] = x[c * s + p];
        UNROLL for (int j = 0; j < POSITIONS; j++) {
            vec sum = y[c * s + j];
            UNROLL for (int p = 0; p < PART; p++) sum = FMA(tile[j][p], query[p], sum);
            y[c * s + j] = sum;
        }
    }
}

ALWAYS void add_to_queries(const vec tile[POSITIONS][PART], const vec *x, vec *y, long d, long s) {
    for (long c = 0; c < d; c++) {
        vec sums[PART];
        UNROLL for (int p = 0; p < PART; p++) sums[p] = y[c * s + p];
        UNROLL for (int j = 0; j < POSITIONS; j++) {
            vec key = x[c * s + j];
            IN_REGISTER(key);
            UNROLL for (int p = 0; p < PART; p++) sums[p] = FMA(tile[j][p], key, sums[p]);
        }
        UNROLL for (int p = 0; p < PART; p++) y[c * s + p] = sums[p];
    }
}

/* One head backward: dq, dk, dv += gradients; `along` is the sum over channels of dy times the output. */
static __attribute__((noinline)) void attend_back(const vec *queries, const vec *keys, const vec *values,
                                                  const vec *dy, const vec *largest, const vec *inverse,
                                                  const vec *along, long d, long s, long n, vec *dq, vec *dk,
                                                  vec *dv) {
    for (long first = 0; first < n; first += POSITIONS) /* keys outside: theirs are the more sums */
        for (long at = first; at < n; at += PART) {
            if (at + PART <= first) continue;
            vec weights[POSITIONS][PART], tile[POSITIONS][PART];
            scores_tile(queries + at, keys + first, d, s, weights);
            UNROLL for (int p = 0; p < PART; p++) UNROLL for (int j = 0; j < POSITIONS; j++) {
                vec weight = exponential(weights[j][p] - largest[at + p]) * inverse[at + p];
                if (at < first + POSITIONS && first + j > at + p) weight = (vec){0};
                weights[j][p] = weight;
            }
            add_to_keys(weights, dy + at, dv + first, d, s);
            scores_tile(dy + at, values + first, d, s, tile);
            UNROLL for (int p = 0; p < PART; p++) UNROLL for (int j = 0; j < POSITIONS; j++)
                tile[j][p] = weights[j][p] * (tile[j][p] - along[at + p]);
            add_to_keys(tile, queries + at, dk + first, d, s);
            add_to_queries(tile, keys + first, dq + at, d, s);
        }
}

/* ---- feed-forwards */

/* 1 / (1 + exp(-x)) */
ALWAYS vec sigmoid(vec x) {
    vec small = exponential(minus_abs(x));
    return choose(x < 0.0f, small, all(1.0f)) / (1.0f + small);
}

/* The normal distribution's share below x, by the tail's fit of Numerical Recipes (erfcc), 1.2e-7 of it. */
ALWAYS vec normal_share(vec x) {
    vec z = minus_abs(x) * 0.70710678f, t = 1.0f / (1.0f - 0.5f * z);
    vec p = t * 0.17087277f - 0.82215223f;
    p = p * t + 1.48851587f;
    p = p * t - 1.13520398f;
    p = p * t + 0.27886807f;
    p = p * t - 0.18628806f;
    p = p * t + 0.09678418f;
    p = p * t + 0.37409196f;
    p = p * t + 1.00002368f;
    p = p * t - 1.26551223f;
    vec tail = 0.5f * t * exponential(p - z * z);
    return choose(x < 0.0f, tail, 1.0f - tail);
}

/* A block of what stands between the projections: what is active, and in place of u its slope to each of u. */
static void activate_block(vec *u, long hidden, long kind, long s, vec *active) {
    for (long c = 0; c < hidden; c++)
        UNROLL for (int p = 0; p < POSITIONS; p++) {
            vec *at = u + c * s + p, x = *at, *y = active + c * s + p;
            if (kind == SWIGLU || kind == SILU) {
                vec share = sigmoid(x), silu = x * share, slope = FMA(silu, 1.0f - share, share);
                if (kind == SWIGLU) {
                    vec *value = at + hidden * s;
                    *y = silu * *value;
                    *at = slope * *value;
                    *value = silu;
                } else {
                    *y = silu;
                    *at = slope;
                }
            } else if (kind == GELU) {
                vec share = normal_share(x);
                *y = x * share;
                *at = FMA(x * 0.39894228f, exponential(x * x * -0.5f), share);
            } else {
                vec above = larger(x, (vec){0});
                *y = above * above;
                *at = 2.0f * above;
            }
        }
}

/* ---- the whole */

/* x (batch, seq, dim) of a group's rows into its lanes, zeros where there is none, and back. */
static void gather(const float *x, const train_plan *a, long group, vec *to) {
    const train_shape *t = a->t;
    float *y = (float *)to;
    long rows = t->batch - group * LANES;
    for (long p = 0; p < a->padded; p++) {
        for (long lane = 0; lane < LANES; lane++) {
            const float *from = x + ((group * LANES + lane) * t->seq + p) * t->dim;
            int there = lane < rows && p < t->seq;
            for (long c = 0; c < t->dim; c++) y[(c * a->s + p) * LANES + lane] = there ? from[c] : 0.0f;
        }
    }
}

static void scatter(const vec *from, const train_plan *a, long group, float *x) {
    const train_shape *t = a->t;
    const float *y = (const float *)from;
    long rows = t->batch - group * LANES;
    for (long p = 0; p < t->seq; p++)
        for (long lane = 0; lane < LANES && lane < rows; lane++) {
            float *to = x + ((group * LANES + lane) * t->seq + p) * t->dim;
            for (long c = 0; c < t->dim; c++) to[c] = y[(c * a->s + p) * LANES + lane];
        }
}

static void group_forward(const train_plan *a, const train_layer *layers, const float *norm, float eps,
                          const float *cosines, const float *sines, const float *x, float *y, long group, vec *kept,
                          vec *scratch) {
    const train_shape *t = a->t;
    long s = a->s, n = a->padded, dim = t->dim, d = t->head_dim, h = t->heads, share = h / t->kv_heads;
    vec *normed = scratch, *scores = scratch + dim * s;
    gather(x, a, group, kept);
    for (long i = 0; i < t->layers; i++) {
        const train_layer *l = layers + i;
        vec *at = kept + i * a->k.layer * s, *next = at + a->k.layer * s;
#define KEPT(NAME) (at + a->k.NAME * s)
        vec *mixed = t->residual ? KEPT(mixed) : KEPT(normed), *qkv = KEPT(qkv), *before = t->conv ? KEPT(before) : qkv;
        vec *feed_mixed = t->residual ? KEPT(feed_mixed) : KEPT(feed_normed), *middle = KEPT(y), *out = KEPT(out);
        vec *active = KEPT(active), *slope = KEPT(slope);
        for (long p = 0; p < n; p += POSITIONS) {
            norm_block(KEPT(x) + p, l->mixer_norm, l->mixer_eps, dim, s, KEPT(factor) + p, KEPT(normed) + p);
            if (t->residual) convolve_block(KEPT(normed), l->mixer_taps, t->residual, dim, s, p, mixed);
            product(l->qkv, a->channels, dim, mixed + p, before + p, s);
            if (t->conv) convolve_block(before, l->taps, t->conv, a->channels, s, p, qkv);
            long width = l->rope ? t->rotary_dim : 0;
            rotate_block(qkv + p, h, d, cosines, sines, width, t->seq, s, p, l->scale, 0);
            rotate_block(qkv + h * d * s + p, t->kv_heads, d, cosines, sines, width, t->seq, s, p, 1.0f, 0);
            for (long head = 0; head < h; head++) {
                const vec *keys = qkv + (h + head / share) * d * s, *values = keys + t->kv_heads * d * s;
                attend_block(qkv + head * d * s + p, keys, values, d, s, p, scores, KEPT(largest) + head * s + p,
                             KEPT(inverse) + head * s + p, out + head * d * s + p);
            }
            for (long c = 0; c < dim; c++)
                UNROLL for (int q = 0; q < POSITIONS; q++) middle[c * s + p + q] = KEPT(x)[c * s + p + q];
            add_product(l->out, dim, h * d, out + p, middle + p, s);
            norm_block(middle + p, l->feed_norm, l->feed_eps, dim, s, KEPT(feed_factor) + p, KEPT(feed_normed) + p);
            if (t->residual) convolve_block(KEPT(feed_normed), l->feed_taps, t->residual, dim, s, p, feed_mixed);
            product(l->up, a->up, dim, feed_mixed + p, slope + p, s);
            activate_block(slope + p, t->hidden, t->kind, s, active + p);
            for (long c = 0; c < dim; c++)
                UNROLL for (int q = 0; q < POSITIONS; q++) next[c * s + p + q] = middle[c * s + p + q];
            add_product(l->down, dim, t->hidden, active + p, next + p, s);
        }
    }
    vec *last = kept + t->layers * a->k.layer * s;
    for (long p = 0; p < n; p += POSITIONS)
        norm_block(last + p, norm, eps, dim, s, last + dim * s + p, normed + p);
    scatter(normed, a, group, y);
}

static void group_backward(const train_plan *a, const train_layer *layers, const float *norm, const float *cosines,
                           const float *sines, const float *dy, float *dx, long group, vec *kept, vec *scratch,
                           float *grads) {
    const train_shape *t = a->t;
    long s = a->s, n = a->padded, dim = t->dim, d = t->head_dim, h = t->heads, share = h / t->kv_heads;
    long inner = h * d;
    vec *stream = scratch, *normed = stream + dim * s, *out = normed + dim * s, *along = out + inner * s;
    vec *wide = along + h * s, *last = kept + t->layers * a->k.layer * s;
    gather(dy, a, group, normed);
    norm_back(normed, last, last + dim * s, norm, dim, s, n, 0, stream, grads + t->layers * a->g.layer);
    for (long i = t->layers - 1; i >= 0; i--) {
        const train_layer *l = layers + i;
        vec *at = kept + i * a->k.layer * s;
        float *g = grads + i * a->g.layer;
        vec *mixed = t->residual ? KEPT(mixed) : KEPT(normed), *feed_mixed = t->residual ? KEPT(feed_mixed) : KEPT(feed_normed);
        vec *qkv = KEPT(qkv), *slope = KEPT(slope);
        /* the feed-forward */
        outer(stream, dim, KEPT(active), t->hidden, s, n, g + a->g.down);
        for (long p = 0; p < n; p += POSITIONS) {
            transposed(l->down, dim, t->hidden, stream + p, wide + p, s);
            for (long c = 0; c < t->hidden; c++) UNROLL for (int q = 0; q < POSITIONS; q++) {
                long here = c * s + p + q, value = here + t->hidden * s;
                vec from = wide[here];
                wide[here] = from * slope[here];
                if (t->kind == SWIGLU) wide[value] = from * slope[value];
            }
            transposed(l->up, a->up, dim, wide + p, normed + p, s);
        }
        outer(wide, a->up, feed_mixed, dim, s, n, g + a->g.up);
        if (t->residual)
            convolve_back(normed, KEPT(feed_normed), l->feed_taps, t->residual, dim, s, n, g + a->g.feed_taps);
        norm_back(normed, KEPT(y), KEPT(feed_factor), l->feed_norm, dim, s, n, 1, stream, g + a->g.feed_norm);
        /* attention */
        outer(stream, dim, KEPT(out), inner, s, n, g + a->g.out);
        for (long p = 0; p < n; p += POSITIONS) {
            transposed(l->out, dim, inner, stream + p, out + p, s);
            for (long head = 0; head < h; head++) UNROLL for (int q = 0; q < POSITIONS; q++) {
                vec sum = {0};
                for (long c = head * d; c < head * d + d; c++) sum = FMA(out[c * s + p + q], KEPT(out)[c * s + p + q], sum);
                along[head * s + p + q] = sum;
            }
        }
        for (long c = 0; c < a->channels; c++)
            for (long p = 0; p < n; p++) wide[c * s + p] = (vec){0};
        for (long head = 0; head < h; head++) {
            long key = (h + head / share) * d * s, value = key + t->kv_heads * d * s, query = head * d * s;
            attend_back(qkv + query, qkv + key, qkv + value, out + query, KEPT(largest) + head * s,
                        KEPT(inverse) + head * s, along + head * s, d, s, n, wide + query, wide + key, wide + value);
        }
        long width = l->rope ? t->rotary_dim : 0;
        for (long p = 0; p < n; p += POSITIONS) {
            rotate_block(wide + p, h, d, cosines, sines, width, t->seq, s, p, l->scale, 1);
            rotate_block(wide + inner * s + p, t->kv_heads, d, cosines, sines, width, t->seq, s, p, 1.0f, 1);
        }
        if (t->conv) convolve_back(wide, KEPT(before), l->taps, t->conv, a->channels, s, n, g + a->g.taps);
        outer(wide, a->channels, mixed, dim, s, n, g + a->g.qkv);
        for (long p = 0; p < n; p += POSITIONS) transposed(l->qkv, a->channels, dim, wide + p, normed + p, s);
        if (t->residual)
            convolve_back(normed, KEPT(normed), l->mixer_taps, t->residual, dim, s, n, g + a->g.mixer_taps);
        norm_back(normed, KEPT(x), KEPT(factor), l->mixer_norm, dim, s, n, 1, stream, g + a->g.mixer_norm);
    }
    scatter(stream, a, group, dx);
}

/* y = norm(blocks(x)), both (batch, seq, dim); room as train_sizes says, aligned as a vector is, and left as it is
 * for train_backward. */
void train_forward(const train_shape *t, const train_layer *layers, const float *norm, float eps,
                   const float *cosines, const float *sines, const float *x, float *y, float *room) {
    train_plan a = plan_of(t);
    vec *kept = (vec *)room, *scratch = kept + a.groups * a.kept;
    int threads = (int)t->threads;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int thread = 0; thread < threads; thread++)
        for (long group = thread; group < a.groups; group += threads)
            group_forward(&a, layers, norm, eps, cosines, sines, x, y, group, kept + group * a.kept,
                          scratch + thread * a.scratch);
}

/* dx, and the gradients of all layers' parameters and the last norm's gain one behind another. */
void train_backward(const train_shape *t, const train_layer *layers, const float *norm, const float *cosines,
                    const float *sines, const float *dy, float *dx, float *room, float *grads) {
    train_plan a = plan_of(t);
    vec *kept = (vec *)room, *scratch = kept + a.groups * a.kept;
    int threads = (int)t->threads;
    memset(grads, 0, sizeof(float) * threads * a.grads);
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int thread = 0; thread < threads; thread++)
        for (long group = thread; group < a.groups; group += threads)
            group_backward(&a, layers, norm, cosines, sines, dy, dx, group, kept + group * a.kept,
                           scratch + thread * a.scratch, grads + thread * a.grads);
    for (int thread = 1; thread < threads; thread++)
        for (long i = 0; i < a.grads; i++) grads[i] += grads[thread * a.grads + i];
}
