/* One token a row through all blocks of a plain Transformer: norms, projections, short convolutions,
 * rotary positions, attention over pages, feed-forwards. Part of kernels.c; called by models/fused.py,
 * where the shapes and what is supported are told. */

enum { SWIGLU, SILU, GELU, RELU2 };

typedef struct {
    const float *mixer_norm, *qkv, *qkv_bias, *taps, *out, *out_bias;
    const float *feed_norm, *up, *up_bias, *down, *down_bias;
    float *keys, *values, *tail;
    float mixer_eps, feed_eps, scale, softcap;
    long rope;
} layer_of;

/* What stands before the blocks and behind them; NULL where the caller sees to it. */
typedef struct {
    const float *embedding, *norm;
    float scale, eps;
} ends_of;

typedef struct {
    long layers, dim, heads, kv_heads, head_dim, rotary_dim, hidden, kind, conv_width;
    long page_size, pages, slots, threads, vocab;
} shape_of;

static void rms_norm(const float *x, const float *w, float eps, long n, long dim, float *y) {
    for (long i = 0; i < n; i++, x += dim, y += dim) {
        vec sums = {0};
        float sum = 0.0f;
        long c = 0;
        for (; c + LANES <= dim; c += LANES) sums = FMA(load(x + c), load(x + c), sums);
        for (; c < dim; c++) sum += x[c] * x[c];
        float factor = 1.0f / sqrtf((sum + sum_lanes(sums)) / (float)dim + eps);
        for (c = 0; c + LANES <= dim; c += LANES) store(y + c, load(x + c) * factor * load(w + c));
        for (; c < dim; c++) y[c] = x[c] * factor * w[c];
    }
}

static void add(float *x, const float *y, long n) {
    long c = 0;
    for (; c + LANES <= n; c += LANES) store(x + c, load(x + c) + load(y + c));
    for (; c < n; c++) x[c] += y[c];
}

/* x * sigmoid(x) */
ALWAYS vec silu(vec x) {
    typedef int32_t ints __attribute__((vector_size(4 * LANES)));
    ints below = x < 0.0f;
    vec small = exponential((vec)((ints)x | ((ints){0} + INT32_MIN))); /* of -|x| */
    vec top = (vec)(((ints)small & below) | ((ints)((vec){0} + 1.0f) & ~below));
    return x * top / (1.0f + small);
}

static float silu_of(float x) { return x / (1.0f + expf(-x)); }

/* What stands between the projections of a feed-forward, for one row. */
static void activate(const float *u, long hidden, long kind, float *y) {
    long c = 0;
    if (kind == SWIGLU || kind == SILU)
        for (; c + LANES <= hidden; c += LANES) {
            vec gate = silu(load(u + c));
            store(y + c, kind == SWIGLU ? gate * load(u + hidden + c) : gate);
        }
    for (; c < hidden; c++) {
        float v = u[c];
        if (kind == SWIGLU) y[c] = silu_of(v) * u[hidden + c];
        else if (kind == SILU) y[c] = silu_of(v);
        else if (kind == GELU) y[c] = 0.5f * v * (1.0f + erff(v * 0.70710678f));
        else y[c] = v > 0.0f ? v * v : 0.0f;
    }
}

/* A short convolution of one token of a lane, whose earlier inputs are in `tail`, the newest last; where
 * `kept` is not NULL, what `tail` is behind it is noted there. */
static void convolve(float *x, float *tail, const float *taps, long width, long channels, float *kept) {
    long c = 0;
    for (; c + LANES <= channels; c += LANES) {
        vec now = load(x + c), y = FMA(now, load(taps + c), now);
        for (long j = 1; j < width; j++)
            y = FMA(load(taps + j * channels + c), load(tail + (width - 1 - j) * channels + c), y);
        store(x + c, y);
        for (long j = 0; j + 2 < width; j++) store(tail + j * channels + c, load(tail + (j + 1) * channels + c));
        if (width > 1) store(tail + (width - 2) * channels + c, now);
    }
    for (; c < channels; c++) {
        float now = x[c], y = now * (1.0f + taps[c]);
        for (long j = 1; j < width; j++) y += taps[j * channels + c] * tail[(width - 1 - j) * channels + c];
        x[c] = y;
        for (long j = 0; j + 2 < width; j++) tail[j * channels + c] = tail[(j + 1) * channels + c];
        if (width > 1) tail[(width - 2) * channels + c] = now;
    }
    if (kept) memcpy(kept, tail, sizeof(float) * (width - 1) * channels);
}

static void rotate(float *head, const float *cosines, const float *sines, long width) {
    long half = width / 2;
    for (long c = 0; c < half; c++) {
        float a = head[c], b = head[c + half];
        head[c] = a * cosines[c] + b * sines[c];
        head[c + half] = b * cosines[c + half] + a * sines[c + half];
    }
}

/* x (n, dim), in place; its rows are embedded here where `ends` has an embedding. Row i is the token at lengths[i] of a lane whose pages are tables[i]; rows of one
 * lane stand in the order of their tokens. `room` holds
 * n * (dim + both) numbers, `both` the widest input and output of a projection; `kept`, where it is not
 * NULL, takes the convolutions' inputs behind every row: (layers, n, conv_width - 1, channels). Returns
 * as paged_attention does, 3 for a token that there is not. */
int decode_blocks(const shape_of *s, const layer_of *layers, const ends_of *ends, const int64_t *tokens,
                  float *x, long n, const float *cosines,
                  const float *sines, const int32_t *tables, long table_step, const int32_t *lengths,
                  const int64_t *slots, float *room, float *kept) {
    long h = s->heads, k = s->kv_heads, d = s->head_dim, channels = (h + 2 * k) * d;
    long up = s->kind == SWIGLU ? 2 * s->hidden : s->hidden, wide = channels > up ? channels : up;
    float *normed = room, *first = normed + n * s->dim, *second = first + n * wide;
    long page_step = k * s->page_size * d;
    int threads = (int)s->threads;
    for (long i = 0; i < n; i++) {
        long page = lengths[i] / s->page_size;
        if (lengths[i] < 0 || page >= table_step || (slots && (slots[i] < 0 || slots[i] >= s->slots))) return 2;
        for (long p = 0; p <= page; p++)
            if (tables[i * table_step + p] < 0 || tables[i * table_step + p] >= s->pages) return 2;
    }
    if (ends->embedding)
        for (long i = 0; i < n; i++) {
            if (tokens[i] < 0 || tokens[i] >= s->vocab) return 3;
            for (long c = 0; c < s->dim; c++)
                x[i * s->dim + c] = ends->embedding[tokens[i] * s->dim + c] * ends->scale;
        }
    for (const layer_of *l = layers; l < layers + s->layers; l++) {
        rms_norm(x, l->mixer_norm, l->mixer_eps, n, s->dim, normed);
        linear(normed, n, l->qkv, 0, channels, s->dim, l->qkv_bias, first, threads);
        for (long i = 0; i < n; i++) {
            float *row = first + i * channels;
            if (l->taps)
                convolve(row, l->tail + slots[i] * (s->conv_width - 1) * channels, l->taps, s->conv_width,
                         channels, kept ? kept + ((l - layers) * n + i) * (s->conv_width - 1) * channels : NULL);
            if (l->rope)
                for (long head = 0; head < h + k; head++)
                    rotate(row + head * d, cosines + lengths[i] * s->rotary_dim,
                           sines + lengths[i] * s->rotary_dim, s->rotary_dim);
            /* all of them before any row looks: those of one lane see each other */
            const int32_t *table = tables + i * table_step;
            long place = table[lengths[i] / s->page_size] * page_step + lengths[i] % s->page_size * d;
            for (long head = 0; head < k; head++) {
                const float *key = row + (h + head) * d;
                memcpy(l->keys + place + head * s->page_size * d, key, sizeof(float) * d);
                memcpy(l->values + place + head * s->page_size * d, key + k * d, sizeof(float) * d);
            }
        }
        int failed = paged_attention(first, channels, first + h * d, channels, first + (h + k) * d, channels,
                                     l->keys, l->values, s->pages, tables, table_step, lengths, second, n, h,
                                     k, d, s->page_size, l->scale, l->softcap, threads);
        if (failed) return failed;
        linear(second, n, l->out, 0, s->dim, h * d, l->out_bias, normed, threads);
        add(x, normed, n * s->dim);
        rms_norm(x, l->feed_norm, l->feed_eps, n, s->dim, normed);
        linear(normed, n, l->up, 0, up, s->dim, l->up_bias, first, threads);
        for (long i = 0; i < n; i++) activate(first + i * up, s->hidden, s->kind, second + i * s->hidden);
        linear(second, n, l->down, 0, s->dim, s->hidden, l->down_bias, normed, threads);
        add(x, normed, n * s->dim);
    }
    if (ends->norm) rms_norm(x, ends->norm, ends->eps, n, s->dim, x);
    return 0;
}

/* The likeliest token of each row of logits (n, vocab), the first of a tie, and its log-probability. */
void likeliest(const float *logits, long n, long vocab, int64_t *tokens, float *log_probs) {
    typedef int32_t ints __attribute__((vector_size(4 * LANES)));
    for (long i = 0; i < n; i++, logits += vocab) {
        vec most = (vec){0} - INFINITY, sums = {0};
        float largest = -INFINITY;
        long c = 0, token = 0;
        for (; c + LANES <= vocab; c += LANES) {
            vec x = load(logits + c);
            ints above = x > most;
            most = (vec)(((ints)x & above) | ((ints)most & ~above));
        }
        for (; c < vocab; c++) largest = logits[c] > largest ? logits[c] : largest;
        for (int j = 0; j < LANES; j++) largest = most[j] > largest ? most[j] : largest;
        while (token < vocab - 1 && !(logits[token] >= largest)) token++;
        double sum = 0.0;
        for (c = 0; c + LANES <= vocab; c += LANES) {
            sums += exponential(load(logits + c) - largest);
            if (c % (64 * LANES) == 63 * LANES) { sum += sum_lanes(sums); sums = (vec){0}; }
        }
        sum += sum_lanes(sums);
        for (; c < vocab; c++) sum += expf(logits[c] - largest);
        tokens[i] = token;
        log_probs[i] = (float)-log(sum);
    }
}
