/* Generation on a CPU: what PyTorch does in many passes over memory, in one. cpu_kernels.py compiles this file at first use; every
   function is held against plain PyTorch by tests/test_cpu_kernels.py. GCC's vector types (GCC 12 or newer): 16 floats are one
   AVX-512 register, two of AVX2 or four of NEON. A row is computed by one thread and in one order, so results do not depend on the
   number of threads. N rows, B rows of a cache, V vocabulary; names as in model.py.

   -DFLOAT32: numbers are floats, else bfloat16. -DHEAD_DIM=D -DGROUP=G: attention alone, for D a multiple of 32. */
#include <math.h>
#include <stdint.h>
#include <string.h>

#define LANES 16
typedef float vector __attribute__((vector_size(4 * LANES)));
typedef int32_t ints __attribute__((vector_size(4 * LANES)));
#define PICK(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)

#ifdef FLOAT32
typedef float number;
static inline vector load(const number *x) { vector v; memcpy(&v, x, sizeof v); return v; }
static inline void store(number *x, vector v) { memcpy(x, &v, sizeof v); }
static inline vector nearest(vector v) { return v; }
static inline void load_pair(const number *x, vector *a, vector *b) { *a = load(x), *b = load(x + LANES); }
static inline void store_pair(number *x, vector a, vector b) { store(x, a), store(x + LANES, b); }
#else
typedef uint16_t number;  /* bfloat16: the upper half of a float */
typedef uint16_t halves __attribute__((vector_size(2 * LANES)));

static inline vector load(const number *x)
{
    halves h;
    memcpy(&h, x, sizeof h);
    return (vector)(__builtin_convertvector(h, ints) << 16);
}

static inline ints rounded(vector v)  /* the upper half holds the nearest bfloat16, ties to even, as in PyTorch */
{
    return (ints)v + 0x7fff + (((ints)v >> 16) & 1);
}

static inline vector nearest(vector v) { return (vector)(rounded(v) & (int)0xffff0000); }

static inline void store(number *x, vector v)
{
    halves h = __builtin_convertvector(rounded(v) >> 16, halves);
    memcpy(x, &h, sizeof h);
}

/* 32 numbers as two vectors, the even ones and the odd ones: cheaper than in order, and all one to a dot product */
static inline void load_pair(const number *x, vector *a, vector *b)
{
    ints both;
    memcpy(&both, x, sizeof both);
    *a = (vector)(both << 16), *b = (vector)(both & (int)0xffff0000);
}

static inline void store_pair(number *x, vector a, vector b)
{
    ints both = ((rounded(a) >> 16) & 0xffff) | (rounded(b) & (int)0xffff0000);
    memcpy(x, &both, sizeof both);
}
#endif

static inline vector larger(vector a, vector b)
{
    ints more = a > b;
    return (vector)(((ints)a & more) | ((ints)b & ~more));
}

/* Folds a vector onto its halves, quarters ... until every lane holds the result. */
#define FOLD(v, OP) \
    v = OP(v, PICK(v, v, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7)); \
    v = OP(v, PICK(v, v, 4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11)); \
    v = OP(v, PICK(v, v, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13)); \
    v = OP(v, PICK(v, v, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14));
#define ADD(a, b) ((a) + (b))
static inline float sum(vector v) { FOLD(v, ADD) return v[0]; }
static inline float largest(vector v) { FOLD(v, larger) return v[0]; }

/* e^x to about 1e-7 of its value for x <= 88; exactly 0 below -87, so that a masked logit never gets a probability. */
static inline vector exponential(vector x)
{
    ints alive = x > -87.0f;
    vector magic = (vector){0} + 12582912.0f;  /* 1.5 * 2^23: adding it rounds to a whole number */
    vector whole = (x * 1.44269504f + magic) - magic;
    vector r = (x - whole * 0.693359375f) + whole * 2.12194440e-4f;  /* x - whole * ln 2, with ln 2 in two parts */
    vector p = 1.9875691500e-4f * r + 1.3981999507e-3f;  /* the polynomial of Cephes' expf */
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    ints power = (__builtin_convertvector(whole, ints) + 127) << 23;  /* 2^whole */
    return (vector)((ints)(p * (vector)power) & alive);
}

#ifndef HEAD_DIM

/* out = weight * round(x / rms(x)): out and x (N, C), weight (C,) */
void rms_norm(number *out, const number *x, const number *weight, int64_t N, int64_t C, float eps)
{
#pragma omp parallel for
    for (int64_t i = 0; i < N; i++) {
        vector a, b, u, v, squares = {0}, more = {0};
        for (int64_t c = i * C; c < (i + 1) * C; c += 2 * LANES) {
            load_pair(x + c, &a, &b);
            squares += a * a, more += b * b;
        }
        float scale = 1 / sqrtf(sum(squares + more) / C + eps);
        for (int64_t c = 0; c < C; c += 2 * LANES) {
            load_pair(x + i * C + c, &a, &b);
            load_pair(weight + c, &u, &v);
            store_pair(out + i * C + c, u * nearest(a * scale), v * nearest(b * scale));
        }
    }
}

/* RoPE in fp32 on x (N, H, D) in place, rows `stride` apart, with cos and sin (N, D / 2): pairs are (d, d + D / 2) */
void rotate(number *x, const float *cos, const float *sin, int64_t N, int64_t H, int64_t D, int64_t stride)
{
#pragma omp parallel for
    for (int64_t i = 0; i < N; i++)
        for (int64_t h = 0; h < H; h++)
            for (int64_t d = 0; d < D / 2; d += LANES) {
                number *low = x + i * stride + h * D + d, *high = low + D / 2;
                vector a = load(low), b = load(high), c, s;
                memcpy(&c, cos + i * D / 2 + d, sizeof c);
                memcpy(&s, sin + i * D / 2 + d, sizeof s);
                store(low, a * c - b * s);
                store(high, b * c + a * s);
            }
}

/* gate = round(silu(gate)) * up, n numbers each */
void swiglu(number *gate, const number *up, int64_t n)
{
#pragma omp parallel for
    for (int64_t i = 0; i < n; i += 2 * LANES) {
        vector a, b, u, v;
        load_pair(gate + i, &a, &b);
        load_pair(up + i, &u, &v);
        vector least = (vector){0} - 88.0f;  /* below it silu is 0 in either number format */
        a = nearest(a / (exponential(-larger(a, least)) + 1.0f)), b = nearest(b / (exponential(-larger(b, least)) + 1.0f));
        store_pair(gate + i, a * u, b * v);
    }
}

#define BLOCK 256

/* one block of logits as floats x (BLOCK,); what lies beyond the vocabulary is -infinity */
static inline void load_block(vector *x, const number *logits, int64_t left)
{
    for (int j = 0; j < BLOCK / LANES; j++, logits += LANES, left -= LANES)
        if (left >= LANES) x[j] = load(logits);
        else {
            number padded[LANES] = {0};
            if (left > 0) memcpy(padded, logits, left * sizeof(number));
            x[j] = load(padded);
            for (int l = left > 0 ? left : 0; l < LANES; l++) x[j][l] = -INFINITY;
        }
}

/* Index of the first of weights (n,) whose cumulated sum exceeds *target, or else of the last positive one (rounding must
   not step past it); *target keeps what remains of it, at least that token's weight in the second case. */
static inline int64_t invert(const double *weights, int64_t n, double *target)
{
    int64_t chosen = 0;
    for (int64_t j = 0; j < n; j++)
        if (weights[j] > 0) {
            if (*target < weights[j]) return j;
            *target -= weights[chosen = j];
        }
    *target += weights[chosen];
    return chosen;
}

/* tokens (N,): the first whose cumulated softmax(logits / temperature) exceeds u (N,); logits (N, V). In two levels, as
   sample.draw does it: the block of 256 tokens first, then the token inside the block. */
void draw(int64_t *tokens, const number *logits, const double *u, int64_t N, int64_t V, float temperature)
{
    int64_t blocks = (V + BLOCK - 1) / BLOCK;
#pragma omp parallel for
    for (int64_t i = 0; i < N; i++) {
        const number *row = logits + i * V;
        vector x[BLOCK / LANES], most = (vector){0} - INFINITY;
        double sums[blocks], inside[BLOCK], target = 0;
        for (int64_t b = 0; b < blocks; b++) {
            load_block(x, row + b * BLOCK, V - b * BLOCK);
            for (int j = 0; j < BLOCK / LANES; j++) most = larger(x[j], most);
        }
        float top = largest(most);
        for (int64_t b = 0; b < blocks; b++) {
            vector total = {0};
            load_block(x, row + b * BLOCK, V - b * BLOCK);
            for (int j = 0; j < BLOCK / LANES; j++) total += exponential((x[j] - top) / temperature);
            target += sums[b] = sum(total);
        }
        target *= u[i];
        int64_t block = invert(sums, blocks, &target);
        load_block(x, row + block * BLOCK, V - block * BLOCK);
        for (int j = 0; j < BLOCK / LANES; j++) {
            vector weights = exponential((x[j] - top) / temperature);
            for (int l = 0; l < LANES; l++) inside[j * LANES + l] = weights[l];
        }
        tokens[i] = block * BLOCK + invert(inside, BLOCK, &target);
    }
}

#else

enum { D = HEAD_DIM, G = GROUP };

/* lane t is sum(v[t]): adds up 16 vectors at once, with half of the shuffles that 16 sums take; v is overwritten */
static inline __attribute__((always_inline)) vector sums(vector *v)
{
    for (int i = 0; i < 8; i++)
        v[i] = PICK(v[i], v[i + 8], 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23)
             + PICK(v[i], v[i + 8], 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
    for (int i = 0; i < 4; i++)
        v[i] = PICK(v[i], v[i + 4], 0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27)
             + PICK(v[i], v[i + 4], 4, 5, 6, 7, 20, 21, 22, 23, 12, 13, 14, 15, 28, 29, 30, 31);
    for (int i = 0; i < 2; i++)
        v[i] = PICK(v[i], v[i + 2], 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29)
             + PICK(v[i], v[i + 2], 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31);
    return PICK(v[0], v[1], 0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30)
         + PICK(v[0], v[1], 1, 17, 3, 19, 5, 21, 7, 23, 9, 25, 11, 27, 13, 29, 15, 31);
}

/* One key-value head of one row: its queries q (G, D) over tokens first .. n - 1 of keys and values, whose tokens lie
   `stride` numbers apart -> out (G, D). 16 tokens at a time; softmax in one pass: what is summed so far is scaled down
   whenever a larger score turns up. */
static void attend_head(number *out, const number *q, const number *keys, const number *values, int64_t first, int64_t n,
                        int64_t stride)
{
    vector query[G][D / LANES], mixed[G][D / LANES];
    float top[G], total[G];
    for (int g = 0; g < G; g++) {
        top[g] = -INFINITY, total[g] = 0;
        for (int j = 0; j < D / LANES; j += 2) {
            load_pair(q + g * D + j * LANES, &query[g][j], &query[g][j + 1]);
            query[g][j] /= sqrtf(D), query[g][j + 1] /= sqrtf(D);
            mixed[g][j] = mixed[g][j + 1] = (vector){0};
        }
    }
    for (int64_t start = first; start < n; start += LANES) {
        int size = n - start < LANES ? n - start : LANES;
        vector dots[G][LANES], score[G];
        for (int t = 0; t < LANES; t++) {
            const number *key = keys + (t < size ? start + t : start) * stride;
            vector x[D / LANES];
            for (int j = 0; j < D / LANES; j += 2) {
                __builtin_prefetch(key + LANES * stride + j * LANES);  /* without: a fifth slower, waiting for memory */
                load_pair(key + j * LANES, &x[j], &x[j + 1]);
            }
            for (int g = 0; g < G; g++) {
                dots[g][t] = x[0] * query[g][0];
                for (int j = 1; j < D / LANES; j++) dots[g][t] += x[j] * query[g][j];
            }
        }
        for (int g = 0; g < G; g++) {
            score[g] = sums(dots[g]);
            for (int t = size; t < LANES; t++) score[g][t] = -INFINITY;
            float best = largest(score[g]);
            if (best > top[g]) {
                float shrink = expf(top[g] - best);
                top[g] = best, total[g] *= shrink;
                for (int j = 0; j < D / LANES; j++) mixed[g][j] *= shrink;
            }
            score[g] = exponential(score[g] - top[g]);
            total[g] += sum(score[g]);
        }
        for (int t = 0; t < size; t++)
            for (int j = 0; j < D / LANES; j += 2) {
                const number *value = values + (start + t) * stride + j * LANES;
                vector a, b;
                __builtin_prefetch(value + LANES * stride);
                load_pair(value, &a, &b);
                for (int g = 0; g < G; g++) mixed[g][j] += a * score[g][t], mixed[g][j + 1] += b * score[g][t];
            }
    }
    for (int g = 0; g < G; g++)
        for (int j = 0; j < D / LANES; j += 2)
            store_pair(out + g * D + j * LANES, mixed[g][j] / total[g], mixed[g][j + 1] / total[g]);
}

/* One new token for each of B rows: k and v (B, Hkv, D) go to keys and values (B, T, Hkv, D) at lengths (B,); then q
   (B, Hkv * G, D) attends to that token and those before it, `window` of them at most -> out (B, Hkv * G, D). Rows of q lie
   q_stride apart, those of k and v k_stride. */
void attend(number *out, const number *q, const number *k, const number *v, number *keys, number *values,
            const int64_t *lengths, int64_t B, int64_t T, int64_t Hkv, int64_t q_stride, int64_t k_stride,
            int64_t window)
{
#pragma omp parallel for collapse(2) schedule(dynamic, Hkv)
    for (int64_t i = 0; i < B; i++)
        for (int64_t h = 0; h < Hkv; h++) {
            int64_t n = lengths[i] + 1, stride = Hkv * D, row = (i * T * Hkv + h) * D;
            memcpy(keys + row + lengths[i] * stride, k + i * k_stride + h * D, D * sizeof(number));
            memcpy(values + row + lengths[i] * stride, v + i * k_stride + h * D, D * sizeof(number));
            attend_head(out + (i * Hkv + h) * G * D, q + i * q_stride + h * G * D, keys + row, values + row,
                        n > window ? n - window : 0, n, stride);
        }
}
#endif
