/* Inference on a CPU in float32: products of a few rows with a weight, attention over pages.
 *
 * Weights stay as nn.Linear holds them, (outputs, inputs) row-major. Every output is one dot product
 * in one fixed order: LANES partial sums along the inputs, then a tree over the lanes. Nothing of that
 * order depends on how many rows there are, where a row stands, or how many threads share the work, so
 * a row's bits never depend on its neighbours.
 */

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(__AVX512F__)
#define LANES 16
#elif defined(__AVX__)
#define LANES 8
#else
#define LANES 4
#endif

#define ALWAYS static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 16")

#if defined(__AVX512F__)
#define IN_REGISTER(v) __asm__("" : "+v"(v))
#elif defined(__x86_64__)
#define IN_REGISTER(v) __asm__("" : "+x"(v))
#else
#define IN_REGISTER(v)
#endif
typedef float vec __attribute__((vector_size(4 * LANES)));
typedef float loose __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

/* a * b + c, always rounded once where the processor can: a compiler left to choose chooses anew in
 * every function, and bits would differ. */
#if defined(__AVX512F__)
#include <immintrin.h>
#define FMA(a, b, c) ((vec)_mm512_fmadd_ps((__m512)(a), (__m512)(b), (__m512)(c)))
#elif defined(__FMA__)
#include <immintrin.h>
#define FMA(a, b, c) ((vec)_mm256_fmadd_ps((__m256)(a), (__m256)(b), (__m256)(c)))
#elif defined(__aarch64__)
#include <arm_neon.h>
#define FMA(a, b, c) ((vec)vfmaq_f32((float32x4_t)(c), (float32x4_t)(a), (float32x4_t)(b)))
#else
#define FMA(a, b, c) ((a) * (b) + (c))
#endif

ALWAYS vec load(const float *p) { return *(const loose *)p; }
ALWAYS void store(float *p, vec v) { *(loose *)p = v; }

/* The first n numbers, n < LANES, zeros after them. */
ALWAYS vec load_part(const float *p, long n) {
    vec v = {0};
    for (long i = 0; i < n; i++) v[i] = p[i];
    return v;
}

ALWAYS float sum_lanes(vec v) {
    float s[LANES];
    memcpy(s, &v, sizeof s);
    UNROLL for (int half = LANES / 2; half > 0; half /= 2)
        UNROLL for (int i = 0; i < half; i++) s[i] += s[i + half];
    return s[0];
}

/* The same sums of four vectors at once, by fewer shuffles. */
typedef float four __attribute__((vector_size(16)));
#if LANES == 16
#define LOW8 0, 1, 2, 3, 4, 5, 6, 7
ALWAYS four sum_four(vec a, vec b, vec c, vec d) {
    vec ab = __builtin_shufflevector(a, b, LOW8, 16, 17, 18, 19, 20, 21, 22, 23) +
             __builtin_shufflevector(a, b, 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
    vec cd = __builtin_shufflevector(c, d, LOW8, 16, 17, 18, 19, 20, 21, 22, 23) +
             __builtin_shufflevector(c, d, 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
    vec all = __builtin_shufflevector(ab, cd, 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27) +
              __builtin_shufflevector(ab, cd, 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31);
    all += __builtin_shufflevector(all, all, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13);
    all += __builtin_shufflevector(all, all, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14);
    return __builtin_shufflevector(all, all, 0, 4, 8, 12);
}
#else
ALWAYS four sum_four(vec a, vec b, vec c, vec d) {
    return (four){sum_lanes(a), sum_lanes(b), sum_lanes(c), sum_lanes(d)};
}
#endif

/* Rows of x in one block; with them the registers hold 4 sums each. */
#if LANES == 16
#define MOST 6
#else
#define MOST 2
#endif
/* Up to so many rows, four rows of weights that lie far apart are read from end to end: memory answers
 * four such streams faster than one (14.5 GB/s against 12.3 on one core of a Xeon). It is asked AHEAD
 * bytes before its use. */
#define FAR_MOST 4
#define AHEAD 1024
/* Beyond, by four rows at a time, again for each block of rows of x: each of the first four passes asks
 * for a fourth of the weights that come FURTHER rows later, into the second cache. Asked for any faster,
 * they hold up the arithmetic: at 16 rows and three passes a third of the speed went. */
#define PASSES 4
#define FURTHER 8

/* Weights are float, or bfloat16: the upper half of one. */
typedef uint16_t halves __attribute__((vector_size(2 * LANES)));
typedef uint16_t loose_halves __attribute__((vector_size(2 * LANES), aligned(2), may_alias));
typedef uint32_t words __attribute__((vector_size(4 * LANES)));

ALWAYS vec load_weight(const char *p, long i, const int SIZE) {
    if (SIZE == 4) return load((const float *)p + i);
    halves upper = *(const loose_halves *)((const uint16_t *)p + i);
    return (vec)(__builtin_convertvector(upper, words) << 16);
}

ALWAYS vec load_weight_part(const char *p, long i, long n, const int SIZE) {
    if (SIZE == 4) return load_part((const float *)p + i, n);
    words v = {0};
    for (long k = 0; k < n; k++) v[k] = (uint32_t)((const uint16_t *)p)[i + k] << 16;
    return (vec)v;
}

/* What memory is asked for beside the arithmetic: nothing, a line of what is at `next`, or what comes
 * AHEAD bytes later in each row of w. */
enum { NOTHING, THERE, EACH_ROW };

/* M rows of x against R rows of w, R being 4 or 1, w's numbers of SIZE bytes. The rows of w are w_step
 * rows apart, and so are their columns of y. */
ALWAYS void block(const float *x, long x_stride, const char *w, long w_step, long inputs, const float *bias,
                  float *y, long y_stride, const char *next, const int M, const int R, const int ASKED,
                  const int SIZE) {
    vec sums[MOST][4];
    long rest = inputs % LANES, whole = inputs - rest, w_stride = w_step * inputs * SIZE;
    UNROLL for (int i = 0; i < M; i++) UNROLL for (int r = 0; r < R; r++) sums[i][r] = (vec){0};
    for (long k = 0; k < whole; k += LANES) {
        vec weights[4];
        UNROLL for (int r = 0; r < R; r++) {
            if (ASKED == EACH_ROW) __builtin_prefetch(w + r * w_stride + k * SIZE + AHEAD, 0, 3);
            weights[r] = load_weight(w + r * w_stride, k, SIZE);
        }
        if (ASKED == THERE) __builtin_prefetch(next + k * SIZE, 0, 2);
        UNROLL for (int i = 0; i < M; i++) {
            vec row = load(x + i * x_stride + k);
            IN_REGISTER(row);
            UNROLL for (int r = 0; r < R; r++) sums[i][r] = FMA(row, weights[r], sums[i][r]);
        }
    }
    if (rest) {
        vec weights[4];
        UNROLL for (int r = 0; r < R; r++) weights[r] = load_weight_part(w + r * w_stride, whole, rest, SIZE);
        UNROLL for (int i = 0; i < M; i++) {
            vec row = load_part(x + i * x_stride + whole, rest);
            UNROLL for (int r = 0; r < R; r++) sums[i][r] = FMA(row, weights[r], sums[i][r]);
        }
    }
    UNROLL for (int i = 0; i < M; i++) {
        if (R == 4) {
            four out = sum_four(sums[i][0], sums[i][1], sums[i][2], sums[i][3]);
            if (bias)
                UNROLL for (int r = 0; r < R; r++) out[r] += bias[r * w_step];
            if (ASKED == EACH_ROW)
                UNROLL for (int r = 0; r < R; r++) y[i * y_stride + r * w_step] = out[r];
            else memcpy(y + i * y_stride, &out, sizeof out);
        } else {
            y[i * y_stride] = sum_lanes(sums[i][0]) + (bias ? bias[0] : 0.0f);
        }
    }
}

typedef void block_of(const float *x, long x_stride, const char *w, long w_step, long inputs,
                      const float *bias, float *y, long y_stride, const char *next);
#define BLOCK(NAME, M, R, ASKED, SIZE)                                                                   \
    static __attribute__((noinline)) void NAME(const float *x, long x_stride, const char *w, long w_step, \
                                               long inputs, const float *bias, float *y, long y_stride,  \
                                               const char *next) {                                       \
        block(x, x_stride, w, ASKED == EACH_ROW ? w_step : 1, inputs, bias, y, y_stride, next, M, R,     \
              ASKED, SIZE);                                                                              \
    }
/* Of each number of rows: one output, four far apart, four side by side without and with what comes next. */
#define BLOCKS(M, SIZE)                                                                                  \
    BLOCK(one_##M##_##SIZE, M, 1, NOTHING, SIZE)                                                         \
    BLOCK(far_##M##_##SIZE, M, 4, EACH_ROW, SIZE)                                                        \
    BLOCK(side_##M##_##SIZE, M, 4, NOTHING, SIZE)                                                        \
    BLOCK(next_##M##_##SIZE, M, 4, THERE, SIZE)
#if MOST == 6
#define EACH(SIZE) BLOCKS(1, SIZE) BLOCKS(2, SIZE) BLOCKS(3, SIZE) BLOCKS(4, SIZE) BLOCKS(5, SIZE) BLOCKS(6, SIZE)
#define NAMES(KIND, SIZE)                                                                                \
    {KIND##_1_##SIZE, KIND##_2_##SIZE, KIND##_3_##SIZE, KIND##_4_##SIZE, KIND##_5_##SIZE, KIND##_6_##SIZE}
#else
#define EACH(SIZE) BLOCKS(1, SIZE) BLOCKS(2, SIZE)
#define NAMES(KIND, SIZE) {KIND##_1_##SIZE, KIND##_2_##SIZE}
#endif
EACH(4)
EACH(2)
enum { ONE, FAR_ROWS, SIDE, NEXT, KINDS };
#define TABLE(SIZE) {NAMES(one, SIZE), NAMES(far, SIZE), NAMES(side, SIZE), NAMES(next, SIZE)}
static block_of *const blocks_of[2][KINDS][MOST] = {TABLE(4), TABLE(2)};

/* Rows of x that go by together, so that they stay in the second cache. */
#define TOGETHER (512 * 1024)

/* Outputs 4 * first and on, before 4 * last. */
static void some_rows(const float *x, long m, const char *w, long size, long outputs, long inputs,
                      const float *bias, float *y, long y_stride, long first, long last) {
    long passes = (m + MOST - 1) / MOST;
    if (m > FAR_MOST && passes < PASSES) passes = PASSES;
    long each = m / passes, more = m % passes;
    /* whole fours; what is left over, in the last thread's share, goes one by one */
    long start = 4 * first, fours = (4 * last < outputs ? 4 * last : outputs) / 4 - first;
    block_of *const(*table)[MOST] = blocks_of[size == 2];
    for (long b = 0; b < last - first; b++) {
        int kind = b >= fours ? ONE : m <= FAR_MOST ? FAR_ROWS : NEXT;
        long j = kind == FAR_ROWS ? start + b : start + 4 * b;
        long end = kind == ONE && j + 4 > outputs ? outputs : j + 1;
        for (; j < end; j++) {
            const char *from = w + j * inputs * size;
            for (long p = 0, i = 0; p < passes; p++) {
                long n = each + (p < more);
                int now = kind == NEXT && p >= PASSES ? SIDE : kind;
                table[now][n - 1](x + i * inputs, inputs, from, fours, inputs, bias ? bias + j : 0,
                                  y + i * y_stride + j, y_stride, from + (FURTHER + p) * inputs * size);
                i += n;
            }
        }
    }
}

/* y (m, outputs) = x (m, inputs) w^T + bias; w of bfloat16 or float. */
void linear(const float *x, long m, const void *w, int bfloat16, long outputs, long inputs,
            const float *bias, float *y, int threads) {
    long blocks = (outputs + 3) / 4, size = bfloat16 ? 2 : 4;
    long most = TOGETHER / (4 * inputs + 1);
    most = most < 4 * MOST ? 4 * MOST : most - most % MOST;
    if (blocks < threads) threads = (int)blocks;
    (void)threads;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int t = 0; t < threads; t++)
        for (long i = 0; i < m; i += most)
            some_rows(x + i * inputs, m - i < most ? m - i : most, w, size, outputs, inputs, bias,
                      y + i * outputs, outputs, blocks * t / threads, blocks * (t + 1) / threads);
}

/* exp of numbers that are at most 0, within 2 units in the last place; 0 below -87. */
ALWAYS vec exponential(vec x) {
    typedef int32_t ints __attribute__((vector_size(4 * LANES)));
    const float magic = 12582912.0f; /* 1.5 * 2^23: what is added to it is rounded to a whole number */
    ints zero = x < -87.0f; /* ones in the numbers of which it holds; NaN stays NaN */
    vec clamped = (vec)((ints)x & ~zero);
    vec shifted = clamped * 1.44269504f + magic, n = shifted - magic;
    vec r = clamped - n * 0.693145752f - n * 1.42860677e-6f; /* ln 2 in two parts */
    vec p = r * 1.9875691500e-4f + 1.3981999507e-3f; /* Cephes' expf */
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    ints power = ((ints)shifted - (ints)((vec){0} + magic) + 127) << 23;
    vec y = p * (vec)power;
    return (vec)((ints)y & ~zero);
}

/* Weights of the softmax, times the sum, which is returned, in place of n scores. */
static float softmax(float *scores, long n, float scale, float softcap) {
    float largest = -INFINITY, sum = 0.0f;
    for (long t = 0; t < n; t++) {
        float s = scores[t] * scale;
        if (softcap > 0.0f) s = softcap * tanhf(s / softcap);
        scores[t] = s;
        largest = s > largest ? s : largest;
    }
    vec sums = {0};
    long t = 0;
    for (; t + LANES <= n; t += LANES) {
        vec e = exponential(load(scores + t) - largest);
        store(scores + t, e);
        sums += e;
    }
    if (t < n) {
        float part[LANES];
        store(part, exponential(load_part(scores + t, n - t) - largest));
        for (long i = 0; t + i < n; i++) sum += scores[t + i] = part[i];
    }
    return sum + sum_lanes(sums);
}

/* WIDE vectors of Q queries' means of values, from `at` on; `rest` numbers of the last are real. */
ALWAYS void means(const float *scores, long stride, const float *sums, const float *pages,
                  const int32_t *table, long page_step, long page_size, long n, long d, float *y,
                  const int Q, const int WIDE, long rest) {
    vec out[4][4];
    UNROLL for (int q = 0; q < Q; q++) UNROLL for (int c = 0; c < WIDE; c++) out[q][c] = (vec){0};
    for (long first = 0; first < n; first += page_size) {
        const float *values = pages + table[first / page_size] * page_step;
        long count = n - first < page_size ? n - first : page_size;
        for (long t = 0; t < count; t++) {
            vec value[4];
            UNROLL for (int c = 0; c < WIDE; c++) {
                const float *from = values + t * d + c * LANES;
                value[c] = WIDE == 1 && rest ? load_part(from, rest) : load(from);
            }
            UNROLL for (int q = 0; q < Q; q++) {
                vec weight = (vec){0} + scores[q * stride + first + t];
                UNROLL for (int c = 0; c < WIDE; c++) out[q][c] = FMA(value[c], weight, out[q][c]);
            }
        }
    }
    UNROLL for (int q = 0; q < Q; q++) UNROLL for (int c = 0; c < WIDE; c++) {
        vec mean = out[q][c] / sums[q];
        if (WIDE == 1 && rest) memcpy(y + q * d, &mean, rest * sizeof(float));
        else store(y + q * d + c * LANES, mean);
    }
}

#define MEANS(Q, WIDE)                                                                                   \
    static __attribute__((noinline)) void means_##Q##_##WIDE(                                            \
        const float *scores, long stride, const float *sums, const float *pages, const int32_t *table,   \
        long page_step, long page_size, long n, long d, float *y, long rest) {                           \
        means(scores, stride, sums, pages, table, page_step, page_size, n, d, y, Q, WIDE, rest);         \
    }
MEANS(1, 1) MEANS(1, 4) MEANS(2, 1) MEANS(2, 4) MEANS(3, 1) MEANS(3, 4) MEANS(4, 1) MEANS(4, 4)
static void (*const means_of[4][2])(const float *, long, const float *, const float *, const int32_t *,
                                    long, long, long, long, float *, long) = {
    {means_1_1, means_1_4}, {means_2_1, means_2_4}, {means_3_1, means_3_4}, {means_4_1, means_4_4}};

/* One key/value head of one lane: `share` queries over n tokens. `room` holds share * n numbers. */
static void one_head(const float *queries, const float *keys, const float *values, const int32_t *table,
                     long page_step, long page_size, long n, long share, long d, float scale,
                     float softcap, float *room, float *y) {
    for (long q = 0; q < share;) {
        long group = share - q < MOST ? share - q : MOST;
        for (long first = 0; first < n; first += page_size) {
            const char *page = (const char *)(keys + table[first / page_size] * page_step);
            long count = n - first < page_size ? n - first : page_size, t = 0;
            float *scores = room + q * n + first;
            for (; t + 4 <= count; t += 4)
                blocks_of[0][SIDE][group - 1](queries + q * d, d, page + 4 * t * d, 1, d, 0, scores + t, n, 0);
            for (; t < count; t++)
                blocks_of[0][ONE][group - 1](queries + q * d, d, page + 4 * t * d, 1, d, 0, scores + t, n, 0);
        }
        q += group;
    }
    for (long q = 0; q < share;) {
        long group = share - q < 4 ? share - q : 4;
        float sums[4];
        for (long i = 0; i < group; i++) sums[i] = softmax(room + (q + i) * n, n, scale, softcap);
        long c = 0;
        for (; c + 4 * LANES <= d; c += 4 * LANES)
            means_of[group - 1][1](room + q * n, n, sums, values + c, table, page_step, page_size, n, d,
                                   y + q * d + c, 0);
        for (; c < d; c += LANES)
            means_of[group - 1][0](room + q * n, n, sums, values + c, table, page_step, page_size, n, d,
                                   y + q * d + c, d - c < LANES ? d - c : 0);
        q += group;
    }
}

/* One new token a lane: see functions.py. Returns 0; 1 where memory ran out; 2, having written nothing,
 * where a lane's table is too short or names a page that there is not. */
int paged_attention(const float *queries, long query_step, const float *new_keys, long key_step,
                    const float *new_values, long value_step, float *key_pages, float *value_pages,
                    long n_pages, const int32_t *tables, long table_step, const int32_t *lengths, float *y, long b,
                    long h, long k, long d, long page_size, float scale, float softcap, int threads) {
    long share = h / k, page_step = k * page_size * d, longest = 0;
    int failed = 0;
    (void)threads;
    for (long lane = 0; lane < b; lane++) {
        if (lengths[lane] < 0) continue;
        if (lengths[lane] >= longest) longest = lengths[lane] + 1L;
        if (lengths[lane] / page_size >= table_step) return 2;
        for (long p = 0; p <= lengths[lane] / page_size; p++) {
            int32_t page = tables[lane * table_step + p];
            if (page < 0 || page >= n_pages) return 2;
        }
    }
#pragma omp parallel num_threads(threads) if (threads > 1 && b * k > 1)
    {
        float *room = malloc(sizeof(float) * (share * longest + 1));
        if (!room) {
#pragma omp atomic write
            failed = 1;
        }
#pragma omp for schedule(dynamic)
        for (long task = 0; task < b * k; task++) {
            long lane = task / k, head = task % k, n = lengths[lane] + 1L;
            float *out = y + (lane * h + head * share) * d;
            const int32_t *table = tables + lane * table_step;
            if (n <= 0 || !room) {
                memset(out, 0, sizeof(float) * share * d);
                continue;
            }
            long offset = head * page_size * d;
            long place = table[(n - 1) / page_size] * page_step + offset + (n - 1) % page_size * d;
            memcpy(key_pages + place, new_keys + lane * key_step + head * d, sizeof(float) * d);
            memcpy(value_pages + place, new_values + lane * value_step + head * d, sizeof(float) * d);
            one_head(queries + lane * query_step + head * share * d, key_pages + offset,
                     value_pages + offset, table, page_step, page_size, n, share, d, scale, softcap, room,
                     out);
        }
        free(room);
    }
    return failed;
}

/* Sum of n numbers, read as fast as they can be: in four streams. */
float read_all(const float *p, long n) {
    vec sums[4] = {0};
    long part = n / 4 - n / 4 % (2 * LANES);
    for (long k = 0; k < part; k += 2 * LANES) UNROLL for (int r = 0; r < 4; r++) {
            sums[r] += load(p + r * part + k);
            sums[r] += load(p + r * part + k + LANES);
        }
    return sum_lanes(sums[0] + sums[1] + sums[2] + sums[3]);
}

#include "decode.c"
#include "train.c"
