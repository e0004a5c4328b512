// norm_rope: a norm over heads, weight and bias, then a rotation of pairs.
//
//     n    = norm(x);  a = n*(weight_offset + weight) + bias
//     out0 = c0*a0 - s0*a1
//     out1 = c1*a1 + s1*a0              for the pairs of the first R columns; out = a for the others
//
// or with NORM_LAST out = norm(rotate(x))*(weight_offset + weight) + bias.
//
// A row of D columns belongs to LANES lanes of one warp, which take it in blocks of 8 columns: 128 bits of a 16-bit
// type. A lane holds whole pairs: a unit is one block, or with rotation by halves the two blocks that face each other
// (behind the rotated columns: two neighbours), so shuffles are needed for the statistics alone, and every column is
// read and written by one lane, which makes out == x safe. A group of lanes takes ROWS rows along the tile axis (the
// heads of a token), reads all of them before it computes, and their tables, weight and bias once.
//
// Specialised by the DK_* macros (cuda_rope.py); needs no header. Arithmetic is fp32, rounded once.

typedef unsigned short u16;
typedef unsigned int u32;
typedef long long i64;

enum { BF16, FP16, FP32 };
enum { NO_ROTATION, INTERLEAVED, HALVES };
enum { HALF_TABLES, FULL_TABLES, COMPLEX_TABLES };
enum { NO_NORM, RMS, LAYER };

constexpr int D = DK_D, R = DK_R, ROWS = DK_ROWS, THREADS = DK_THREADS;
constexpr int ROTATION = DK_ROTATION, TABLES = DK_TABLES, NORM = DK_NORM;
constexpr int BLOCK = 8;
constexpr int BLOCKS = ROTATION == HALVES ? 2 : 1;  // of a unit
constexpr int LANES = D / (BLOCK * BLOCKS) < 32 ? D / (BLOCK * BLOCKS) : 32;
constexpr int UNITS = D / (BLOCK * BLOCKS * LANES);  // of a lane
constexpr int PAIRS = BLOCK * BLOCKS / 2;            // of a unit
constexpr int FACTORS = TABLES == HALF_TABLES ? PAIRS : 2 * PAIRS;  // values of a table for a unit
constexpr int ROTATED_UNITS = R / (BLOCK * BLOCKS);

struct Arguments {
    const void *x, *weight, *bias, *cos, *sin;
    void *out;
    i64 x_stride[3], cos_stride[3], sin_stride[3], out_stride[3];  // elements, along the tile axis and two more
    u32 n0, n1, tiles, total;  // rows of the tile axis, size of the next, tiles along the tile axis and in all
    float eps, weight_offset;
};

template <int KIND>
__device__ __forceinline__ float widened(u32 bits) {
    if (KIND == FP32) return __uint_as_float(bits);
    if (KIND == BF16) return __uint_as_float(bits << 16);
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"((u16)bits));
    return value;
}

template <int KIND>
__device__ __forceinline__ u32 narrowed(float low, float high) {
    u32 word;
    if (KIND == BF16)
        asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
    else
        asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
    return word;
}

// N neighbouring elements as they lie in memory.
template <int KIND, int N>
struct Piece {
    static constexpr int SIZE = KIND == FP32 ? 4 : 2;
    static constexpr int WORDS = N * SIZE / 4;
    u32 words[WORDS];

    __device__ __forceinline__ float operator[](int i) const {
        if (KIND == FP32) return __uint_as_float(words[i]);
        return widened<KIND>(i % 2 ? words[i / 2] >> 16 : words[i / 2] & 0xffff);
    }

    __device__ __forceinline__ void clear() {
#pragma unroll
        for (int i = 0; i < WORDS; i++) words[i] = 0;
    }

    // READ_ONLY: nobody writes this memory while the kernel runs.
    template <bool ALIGNED, bool READ_ONLY>
    __device__ __forceinline__ void load(const void *tensor, i64 at) {
        const char *from = (const char *)tensor + at * SIZE;
        if (ALIGNED && WORDS % 4 == 0) {
#pragma unroll
            for (int i = 0; i < WORDS / 4; i++) {
                const uint4 *p = (const uint4 *)from + i;
                uint4 v = READ_ONLY ? __ldg(p) : *p;
                words[4 * i] = v.x, words[4 * i + 1] = v.y, words[4 * i + 2] = v.z, words[4 * i + 3] = v.w;
            }
        } else if (ALIGNED && WORDS % 2 == 0) {
#pragma unroll
            for (int i = 0; i < WORDS / 2; i++) {
                const uint2 *p = (const uint2 *)from + i;
                uint2 v = READ_ONLY ? __ldg(p) : *p;
                words[2 * i] = v.x, words[2 * i + 1] = v.y;
            }
        } else {
#pragma unroll
            for (int i = 0; i < WORDS; i++) {
                if (KIND == FP32)
                    words[i] = ((const u32 *)from)[i];
                else
                    words[i] = ((const u16 *)from)[2 * i] | (u32)((const u16 *)from)[2 * i + 1] << 16;
            }
        }
    }

    template <bool ALIGNED>
    __device__ __forceinline__ void store(void *tensor, i64 at) const {
        char *to = (char *)tensor + at * SIZE;
        if (ALIGNED) {
#pragma unroll
            for (int i = 0; i < WORDS / 4; i++)
                ((uint4 *)to)[i] = make_uint4(words[4 * i], words[4 * i + 1], words[4 * i + 2], words[4 * i + 3]);
        } else {
#pragma unroll
            for (int i = 0; i < WORDS; i++) {
                if (KIND == FP32) {
                    ((u32 *)to)[i] = words[i];
                } else {
                    ((u16 *)to)[2 * i] = (u16)words[i];
                    ((u16 *)to)[2 * i + 1] = (u16)(words[i] >> 16);
                }
            }
        }
    }
};

// The first column of block `block` of a unit.
__device__ __forceinline__ int column_of(int unit, int block) {
    if (ROTATION != HALVES) return unit * BLOCK;
    if (unit < ROTATED_UNITS) return unit * BLOCK + block * (R / 2);
    return R + (unit - ROTATED_UNITS) * 2 * BLOCK + block * BLOCK;
}

__device__ __forceinline__ float over_row(float value) {
#pragma unroll
    for (int offset = LANES / 2; offset > 0; offset /= 2) value += __shfl_xor_sync(0xffffffffu, value, offset);
    return value;
}

// cos and sin of a unit: FACTORS values each; complex tables hold both in cos.
struct Factors {
    float cos[FACTORS], sin[FACTORS];

    template <int N>
    __device__ __forceinline__ void load_run(const void *tensor, i64 at, float *to) {
        Piece<DK_TABLE_KIND, N> piece;
        piece.template load<DK_TABLE_ALIGNED, true>(tensor, at);
#pragma unroll
        for (int i = 0; i < N; i++) to[i] = piece[i];
    }

    __device__ __forceinline__ void load_table(const void *tensor, i64 at, int unit, float *to) {
        if (ROTATION == HALVES && TABLES == FULL_TABLES) {
            load_run<PAIRS>(tensor, at + unit * PAIRS, to);
            load_run<PAIRS>(tensor, at + unit * PAIRS + R / 2, to + FACTORS / 2);
        } else {
            load_run<FACTORS>(tensor, at + unit * FACTORS, to);
        }
    }

    __device__ __forceinline__ void load(const Arguments &a, i64 cos_at, i64 sin_at, int unit) {
        load_table(a.cos, cos_at, unit, cos);
        if (TABLES != COMPLEX_TABLES) load_table(a.sin, sin_at, unit, sin);
    }

    // Of the first (which 0) or second (1) element of pair p.
    __device__ __forceinline__ static int place(int p, int which) {
        if (TABLES != FULL_TABLES) return p;
        return ROTATION == HALVES ? p + which * (FACTORS / 2) : 2 * p + which;
    }
    __device__ __forceinline__ float c(int p, int which) const {
        return TABLES == COMPLEX_TABLES ? cos[2 * p] : cos[place(p, which)];
    }
    __device__ __forceinline__ float s(int p, int which) const {
        return TABLES == COMPLEX_TABLES ? cos[2 * p + 1] : sin[place(p, which)];
    }

    __device__ __forceinline__ void rotate(float (&v)[BLOCKS * BLOCK]) const {
#pragma unroll
        for (int p = 0; p < PAIRS; p++) {
            float &first = v[ROTATION == HALVES ? p : 2 * p];
            float &second = v[ROTATION == HALVES ? p + PAIRS : 2 * p + 1];
            float a0 = first, a1 = second;
            first = c(p, 0) * a0 - s(p, 0) * a1;
            second = c(p, 1) * a1 + s(p, 1) * a0;
        }
    }
};

typedef float Values[UNITS][BLOCKS * BLOCK];

__device__ __forceinline__ void rotate_row(Values &v, const Factors (&factors)[UNITS], int lane) {
#pragma unroll
    for (int u = 0; u < UNITS; u++)
        if (R == D || lane + u * LANES < ROTATED_UNITS) factors[u].rotate(v[u]);
}

__device__ __forceinline__ void normalise_row(Values &v, float eps) {
    float sum = 0;
    if (NORM == LAYER) {
#pragma unroll
        for (int u = 0; u < UNITS; u++)
#pragma unroll
            for (int i = 0; i < BLOCKS * BLOCK; i++) sum += v[u][i];
        float mean = over_row(sum) * (1.0f / D);
#pragma unroll
        for (int u = 0; u < UNITS; u++)
#pragma unroll
            for (int i = 0; i < BLOCKS * BLOCK; i++) v[u][i] -= mean;
        sum = 0;
    }
#pragma unroll
    for (int u = 0; u < UNITS; u++)
#pragma unroll
        for (int i = 0; i < BLOCKS * BLOCK; i++) sum += v[u][i] * v[u][i];
    float factor = rsqrtf(over_row(sum) * (1.0f / D) + eps);
#pragma unroll
    for (int u = 0; u < UNITS; u++)
#pragma unroll
        for (int i = 0; i < BLOCKS * BLOCK; i++) v[u][i] *= factor;
}

extern "C" __global__ void __launch_bounds__(THREADS) norm_rope(const Arguments a) {
    const int lane = threadIdx.x % LANES;
    const u32 tile = blockIdx.x * (u32)(THREADS / LANES) + threadIdx.x / LANES;
    const u32 rest = tile / a.tiles, first = (tile - rest * a.tiles) * ROWS;
    const u32 i2 = rest / a.n1, i1 = rest - i2 * a.n1;
    // Every lane stays to the end, for the shuffles; those without a row neither load nor store.
    const u32 rows = tile < a.total ? a.n0 - first : 0;
    const i64 x_at = first * a.x_stride[0] + i1 * a.x_stride[1] + i2 * a.x_stride[2];
    const i64 cos_at = first * a.cos_stride[0] + i1 * a.cos_stride[1] + i2 * a.cos_stride[2];
    const i64 sin_at = first * a.sin_stride[0] + i1 * a.sin_stride[1] + i2 * a.sin_stride[2];
    const i64 out_at = first * a.out_stride[0] + i1 * a.out_stride[1] + i2 * a.out_stride[2];

    Piece<DK_X_KIND, BLOCK> x[ROWS][UNITS][BLOCKS];
    Piece<DK_WEIGHT_KIND, BLOCK> weight[UNITS][BLOCKS];
    Piece<DK_BIAS_KIND, BLOCK> bias[UNITS][BLOCKS];
    Factors factors[UNITS];
#pragma unroll
    for (int k = 0; k < ROWS; k++)
#pragma unroll
        for (int u = 0; u < UNITS; u++)
#pragma unroll
            for (int j = 0; j < BLOCKS; j++) {
                x[k][u][j].clear();
                if (k < rows)
                    x[k][u][j].template load<DK_X_ALIGNED, false>(
                        a.x, x_at + k * a.x_stride[0] + column_of(lane + u * LANES, j));
            }
#pragma unroll
    for (int u = 0; u < UNITS; u++) {
        const int unit = lane + u * LANES;
        if (ROTATION != NO_ROTATION && !DK_ROW_TABLES && rows > 0 && (R == D || unit < ROTATED_UNITS))
            factors[u].load(a, cos_at, sin_at, unit);
#pragma unroll
        for (int j = 0; j < BLOCKS; j++) {
            if (DK_HAS_WEIGHT) weight[u][j].template load<DK_WEIGHT_ALIGNED, true>(a.weight, column_of(unit, j));
            if (DK_HAS_BIAS) bias[u][j].template load<DK_BIAS_ALIGNED, true>(a.bias, column_of(unit, j));
        }
    }
#pragma unroll
    for (int k = 0; k < ROWS; k++) {
        Values v;
#pragma unroll
        for (int u = 0; u < UNITS; u++) {
            const int unit = lane + u * LANES;
            if (ROTATION != NO_ROTATION && DK_ROW_TABLES && k < rows && (R == D || unit < ROTATED_UNITS))
                factors[u].load(a, cos_at + k * a.cos_stride[0], sin_at + k * a.sin_stride[0], unit);
#pragma unroll
            for (int i = 0; i < BLOCKS * BLOCK; i++) v[u][i] = x[k][u][i / BLOCK][i % BLOCK];
        }
        if (ROTATION != NO_ROTATION && DK_NORM_LAST) rotate_row(v, factors, lane);
        if (NORM != NO_NORM) normalise_row(v, a.eps);
#pragma unroll
        for (int u = 0; u < UNITS; u++)
#pragma unroll
            for (int i = 0; i < BLOCKS * BLOCK; i++) {
                if (DK_HAS_WEIGHT) v[u][i] *= a.weight_offset + weight[u][i / BLOCK][i % BLOCK];
                if (DK_HAS_BIAS) v[u][i] += bias[u][i / BLOCK][i % BLOCK];
            }
        if (ROTATION != NO_ROTATION && !DK_NORM_LAST) rotate_row(v, factors, lane);
        if (k >= rows) continue;
#pragma unroll
        for (int u = 0; u < UNITS; u++)
#pragma unroll
            for (int j = 0; j < BLOCKS; j++) {
                Piece<DK_OUT_KIND, BLOCK> piece;
#pragma unroll
                for (int i = 0; i < piece.WORDS; i++) {
                    const float *from = v[u] + j * BLOCK;
                    piece.words[i] = DK_OUT_KIND == FP32 ? __float_as_uint(from[i % BLOCK])
                                                         : narrowed<DK_OUT_KIND>(from[(2 * i) % BLOCK], from[(2 * i + 1) % BLOCK]);
                }
                piece.template store<DK_OUT_ALIGNED>(a.out, out_at + k * a.out_stride[0] + column_of(lane + u * LANES, j));
            }
    }
}
