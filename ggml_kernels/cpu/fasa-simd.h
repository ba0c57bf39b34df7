// What the FASA kernels need of an ISA: vectors of floats, and dot products of four 8-bit integers a lane.
//
// The kernels are written once, on the functions below. ggml compiles them for each CPU variant, so the ISA is known
// here: AVX-512 (with or without VNNI), AVX2 (with or without AVX-VNNI), NEON (with or without dotprod), or plain C++,
// which a compiler turns into what vectors its target has.

#pragma once

#include "fasa-cpu.h"

#include "../fasa-tips.h"
#include "ggml-cpu-impl.h"
#include "ggml-cpu.h"
#include "ggml-impl.h"
#include "ops.h"
#include "quants.h"
#include "simd-mappings.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#if defined(_MSC_VER) && (defined(_M_X64) || defined(_M_IX86))
#    define FASA_PREFETCH(p) _mm_prefetch((const char *) (p), _MM_HINT_T0)
#elif defined(_MSC_VER)
#    define FASA_PREFETCH(p) __prefetch(p)
#else
#    define FASA_PREFETCH(p) __builtin_prefetch(p)
#endif

//
// floats
//
// vec:           FASA_LANES floats
// v_load_*:      widened to floats; v_load_u4: nibbles of FASA_LANES bytes, the upper ones if high, less 8
// v_fma:         a*b + c
// v_max:         b where a is NaN
// v_select_gt:   a > b ? x : y
// v_bits_gt:     bit i: a > b in lane i
// v_times_pow2:  x*2^n, where n are the lower bits of z (see v_exp2)
// v_sums:        lane i: sum over x[i]
//
// FASA_ACCS: accumulators that leave room for operands among the registers

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__)

#define FASA_AVX512

static constexpr int FASA_LANES = 16;
static constexpr int FASA_ACCS  = 16;

using vec = __m512;

static inline vec  v_set1 (float x)                { return _mm512_set1_ps(x); }
static inline vec  v_load (const float * p)        { return _mm512_loadu_ps(p); }
static inline void v_store(float * p, vec x)       { _mm512_storeu_ps(p, x); }
static inline vec  v_add  (vec a, vec b)           { return _mm512_add_ps(a, b); }
static inline vec  v_sub  (vec a, vec b)           { return _mm512_sub_ps(a, b); }
static inline vec  v_mul  (vec a, vec b)           { return _mm512_mul_ps(a, b); }
static inline vec  v_div  (vec a, vec b)           { return _mm512_div_ps(a, b); }
static inline vec  v_fma  (vec a, vec b, vec c)    { return _mm512_fmadd_ps(a, b, c); }
static inline vec  v_max  (vec a, vec b)           { return _mm512_max_ps(a, b); }

static inline vec v_select_gt(vec a, vec b, vec x, vec y) {
    return _mm512_mask_mov_ps(y, _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ), x);
}

static inline uint32_t v_bits_gt(vec a, vec b) {
    return _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ);
}

static inline vec v_times_pow2(vec x, vec z) {
    return _mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(x), _mm512_slli_epi32(_mm512_castps_si512(z), 23)));
}

static inline vec v_load_f16(const ggml_fp16_t * p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *) p));
}

static inline vec v_load_bf16(const ggml_bf16_t * p) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *) p)), 16));
}

static inline vec v_load_i8(const int8_t * p) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *) p)));
}

static inline vec v_load_u4(const uint8_t * p, bool high) {
    const __m512i bytes   = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *) p));
    const __m512i nibbles = high ? _mm512_srli_epi32(bytes, 4) : _mm512_and_si512(bytes, _mm512_set1_epi32(15));
    return _mm512_cvtepi32_ps(_mm512_sub_epi32(nibbles, _mm512_set1_epi32(8)));
}

static inline vec v_sums(const vec x[16]) {
    vec quads[4]; // four sums in each 128 bits
    for (int i = 0; i < 4; ++i) {
        const vec ab = v_add(_mm512_unpacklo_ps(x[4*i + 0], x[4*i + 1]), _mm512_unpackhi_ps(x[4*i + 0], x[4*i + 1]));
        const vec cd = v_add(_mm512_unpacklo_ps(x[4*i + 2], x[4*i + 3]), _mm512_unpackhi_ps(x[4*i + 2], x[4*i + 3]));

        const __m512d ab_d = _mm512_castps_pd(ab);
        const __m512d cd_d = _mm512_castps_pd(cd);

        quads[i] = v_add(_mm512_castpd_ps(_mm512_unpacklo_pd(ab_d, cd_d)), _mm512_castpd_ps(_mm512_unpackhi_pd(ab_d, cd_d)));
    }
    const auto add_halves = [](vec a, vec b) {
        return v_add(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xDD));
    };
    return add_halves(add_halves(quads[0], quads[1]), add_halves(quads[2], quads[3]));
}

#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)

static constexpr int FASA_LANES = 8;
static constexpr int FASA_ACCS  = 8;

using vec = __m256;

static inline vec  v_set1 (float x)                { return _mm256_set1_ps(x); }
static inline vec  v_load (const float * p)        { return _mm256_loadu_ps(p); }
static inline void v_store(float * p, vec x)       { _mm256_storeu_ps(p, x); }
static inline vec  v_add  (vec a, vec b)           { return _mm256_add_ps(a, b); }
static inline vec  v_sub  (vec a, vec b)           { return _mm256_sub_ps(a, b); }
static inline vec  v_mul  (vec a, vec b)           { return _mm256_mul_ps(a, b); }
static inline vec  v_div  (vec a, vec b)           { return _mm256_div_ps(a, b); }
static inline vec  v_fma  (vec a, vec b, vec c)    { return _mm256_fmadd_ps(a, b, c); }
static inline vec  v_max  (vec a, vec b)           { return _mm256_max_ps(a, b); }

static inline vec v_select_gt(vec a, vec b, vec x, vec y) {
    return _mm256_blendv_ps(y, x, _mm256_cmp_ps(a, b, _CMP_GT_OQ));
}

static inline uint32_t v_bits_gt(vec a, vec b) {
    return _mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_GT_OQ));
}

static inline vec v_times_pow2(vec x, vec z) {
    return _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(x), _mm256_slli_epi32(_mm256_castps_si256(z), 23)));
}

static inline vec v_load_f16(const ggml_fp16_t * p) {
    return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *) p));
}

static inline vec v_load_bf16(const ggml_bf16_t * p) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *) p)), 16));
}

static inline vec v_load_i8(const int8_t * p) {
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *) p)));
}

static inline vec v_load_u4(const uint8_t * p, bool high) {
    const __m256i bytes   = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *) p));
    const __m256i nibbles = high ? _mm256_srli_epi32(bytes, 4) : _mm256_and_si256(bytes, _mm256_set1_epi32(15));
    return _mm256_cvtepi32_ps(_mm256_sub_epi32(nibbles, _mm256_set1_epi32(8)));
}

static inline vec v_sums(const vec x[8]) {
    const vec a = _mm256_hadd_ps(_mm256_hadd_ps(x[0], x[1]), _mm256_hadd_ps(x[2], x[3]));
    const vec b = _mm256_hadd_ps(_mm256_hadd_ps(x[4], x[5]), _mm256_hadd_ps(x[6], x[7]));
    return v_add(_mm256_permute2f128_ps(a, b, 0x20), _mm256_permute2f128_ps(a, b, 0x31));
}

#elif defined(__ARM_NEON) && defined(__aarch64__)

static constexpr int FASA_LANES = 4;
static constexpr int FASA_ACCS  = 16;

using vec = float32x4_t;

static inline vec  v_set1 (float x)                { return vdupq_n_f32(x); }
static inline vec  v_load (const float * p)        { return vld1q_f32(p); }
static inline void v_store(float * p, vec x)       { vst1q_f32(p, x); }
static inline vec  v_add  (vec a, vec b)           { return vaddq_f32(a, b); }
static inline vec  v_sub  (vec a, vec b)           { return vsubq_f32(a, b); }
static inline vec  v_mul  (vec a, vec b)           { return vmulq_f32(a, b); }
static inline vec  v_div  (vec a, vec b)           { return vdivq_f32(a, b); }
static inline vec  v_fma  (vec a, vec b, vec c)    { return vfmaq_f32(c, a, b); }

static inline vec v_select_gt(vec a, vec b, vec x, vec y) {
    return vbslq_f32(vcgtq_f32(a, b), x, y);
}

static inline vec v_max(vec a, vec b) {
    return v_select_gt(a, b, a, b);
}

static inline uint32_t v_bits_gt(vec a, vec b) {
    const uint32_t weights[4] = { 1, 2, 4, 8 };
    return vaddvq_u32(vandq_u32(vcgtq_f32(a, b), vld1q_u32(weights)));
}

static inline vec v_times_pow2(vec x, vec z) {
    return vreinterpretq_f32_s32(vaddq_s32(vreinterpretq_s32_f32(x), vshlq_n_s32(vreinterpretq_s32_f32(z), 23)));
}

static inline vec v_load_f16(const ggml_fp16_t * p) {
    return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p)));
}

static inline vec v_load_bf16(const ggml_bf16_t * p) {
    return vreinterpretq_f32_u32(vshll_n_u16(vld1_u16((const uint16_t *) p), 16));
}

static inline int32x4_t v_widen_i8(int8x8_t x) {
    return vmovl_s16(vget_low_s16(vmovl_s8(x)));
}

static inline vec v_load_i8(const int8_t * p) {
    int32_t four;
    memcpy(&four, p, sizeof(four));
    return vcvtq_f32_s32(v_widen_i8(vreinterpret_s8_s32(vdup_n_s32(four))));
}

static inline vec v_load_u4(const uint8_t * p, bool high) {
    uint32_t four;
    memcpy(&four, p, sizeof(four));
    const uint8x8_t bytes   = vreinterpret_u8_u32(vdup_n_u32(four));
    const uint8x8_t nibbles = high ? vshr_n_u8(bytes, 4) : vand_u8(bytes, vdup_n_u8(15));
    return vcvtq_f32_s32(v_widen_i8(vsub_s8(vreinterpret_s8_u8(nibbles), vdup_n_s8(8))));
}

static inline vec v_sums(const vec x[4]) {
    return vpaddq_f32(vpaddq_f32(x[0], x[1]), vpaddq_f32(x[2], x[3]));
}

#else

static constexpr int FASA_LANES = 8;
static constexpr int FASA_ACCS  = 8;

struct vec {
    float lane[FASA_LANES];
};

// each lane for itself
template <typename F>
static inline vec v_map(F f) {
    vec res;
    for (int i = 0; i < FASA_LANES; ++i) {
        res.lane[i] = f(i);
    }
    return res;
}

static inline vec  v_set1 (float x)                { return v_map([&](int)   { return x; }); }
static inline vec  v_load (const float * p)        { return v_map([&](int i) { return p[i]; }); }
static inline void v_store(float * p, vec x)       { memcpy(p, x.lane, sizeof(x.lane)); }
static inline vec  v_add  (vec a, vec b)           { return v_map([&](int i) { return a.lane[i] + b.lane[i]; }); }
static inline vec  v_sub  (vec a, vec b)           { return v_map([&](int i) { return a.lane[i] - b.lane[i]; }); }
static inline vec  v_mul  (vec a, vec b)           { return v_map([&](int i) { return a.lane[i]*b.lane[i]; }); }
static inline vec  v_div  (vec a, vec b)           { return v_map([&](int i) { return a.lane[i] / b.lane[i]; }); }
static inline vec  v_fma  (vec a, vec b, vec c)    { return v_map([&](int i) { return a.lane[i]*b.lane[i] + c.lane[i]; }); }
static inline vec  v_max  (vec a, vec b)           { return v_map([&](int i) { return a.lane[i] > b.lane[i] ? a.lane[i] : b.lane[i]; }); }

static inline vec v_select_gt(vec a, vec b, vec x, vec y) {
    return v_map([&](int i) { return a.lane[i] > b.lane[i] ? x.lane[i] : y.lane[i]; });
}

static inline uint32_t v_bits_gt(vec a, vec b) {
    uint32_t bits = 0;
    for (int i = 0; i < FASA_LANES; ++i) {
        bits |= (uint32_t) (a.lane[i] > b.lane[i]) << i;
    }
    return bits;
}

static inline vec v_times_pow2(vec x, vec z) {
    return v_map([&](int i) {
        uint32_t bits, n;
        memcpy(&bits, &x.lane[i], sizeof(bits));
        memcpy(&n,    &z.lane[i], sizeof(n));
        bits += n << 23;
        float res;
        memcpy(&res, &bits, sizeof(res));
        return res;
    });
}

static inline vec v_load_f16 (const ggml_fp16_t * p) { return v_map([&](int i) { return GGML_CPU_FP16_TO_FP32(p[i]); }); }
static inline vec v_load_bf16(const ggml_bf16_t * p) { return v_map([&](int i) { return GGML_BF16_TO_FP32(p[i]); }); }
static inline vec v_load_i8  (const int8_t      * p) { return v_map([&](int i) { return (float) p[i]; }); }

static inline vec v_load_u4(const uint8_t * p, bool high) {
    return v_map([&](int i) { return (float) (high ? p[i] >> 4 : p[i] & 15) - 8.0f; });
}

static inline vec v_sums(const vec x[FASA_LANES]) {
    return v_map([&](int i) {
        float sum = 0.0f;
        for (float lane : x[i].lane) {
            sum += lane;
        }
        return sum;
    });
}

#endif

static constexpr float FASA_LOG2_E = 1.44269504f;

static constexpr float FASA_EXP2_LEAST = -126.0f;

// 2^x for x <= 0 within 2 ulp; beneath -126, where an f32 sum that holds a 1 does not notice, 2^-126; NaN stays NaN
static inline vec v_exp2(vec x) {
    x = v_max(v_set1(FASA_EXP2_LEAST), x);

    const vec magic = v_set1(0x1.8p23f); // adding it rounds, and leaves the integer in the lower bits
    const vec z     = v_add(x, magic);
    const vec f     = v_sub(x, v_sub(z, magic)); // from -1/2 to 1/2

    // least relative error
    vec p = v_set1(1.327647177e-3f);
    p = v_fma(p, f, v_set1(9.675541333e-3f));
    p = v_fma(p, f, v_set1(5.550713274e-2f));
    p = v_fma(p, f, v_set1(2.402211972e-1f));
    p = v_fma(p, f, v_set1(6.931469671e-1f));
    p = v_fma(p, f, v_set1(1.0f));

    return v_times_pow2(p, z);
}

// within 1e-7, also near 0; NaN stays NaN
static inline vec v_tanh(vec x) {
    const vec zero = v_set1(0.0f);
    const vec one  = v_set1(1.0f);
    const vec e    = v_exp2(v_mul(v_max(x, v_sub(zero, x)), v_set1(-2.0f*FASA_LOG2_E)));
    const vec t    = v_div(v_sub(one, e), v_add(one, e));

    return v_select_gt(zero, x, v_sub(zero, t), t);
}

static inline float v_sum(vec x) {
    float lanes[FASA_LANES];
    v_store(lanes, x);
    float sum = 0.0f;
    for (float lane : lanes) {
        sum += lane;
    }
    return sum;
}

// NaN is skipped
static inline float v_greatest(vec x) {
    float lanes[FASA_LANES];
    v_store(lanes, x);
    float res = -INFINITY;
    for (float lane : lanes) {
        res = lane > res ? lane : res;
    }
    return res;
}

// bits of the first n lanes
static inline uint32_t v_bits_first(int64_t n) {
    return n < FASA_LANES ? (1u << n) - 1 : (uint32_t) ((1ull << FASA_LANES) - 1);
}

// write from[i] for every set bit i, return their number; reads and writes up to FASA_LANES values of four bytes
template <typename T>
static inline int64_t v_append(uint32_t bits, const T * from, T * to) {
    static_assert(sizeof(T) == 4, "");
#if defined(FASA_AVX512)
    _mm512_storeu_si512(to, _mm512_maskz_compress_epi32((__mmask16) bits, _mm512_loadu_si512(from)));

    return _mm_popcnt_u32(bits);
#else
    int64_t n = 0;
    for (; bits; bits >>= 1, ++from) {
        to[n] = *from;
        n += bits & 1;
    }
    return n;
#endif
}

// the same for first + i
static inline int64_t v_append_ids(uint32_t bits, int32_t first, int32_t * ids) {
    int32_t lanes[FASA_LANES];
    for (int i = 0; i < FASA_LANES; ++i) {
        lanes[i] = first + i;
    }
    return v_append(bits, lanes, ids);
}

//
// tips
//
// ivec:   FASA_LANES lanes, in each four bytes or a sum
// i_load: loads the four bytes of a pair of quads, a cell for each lane; i_lower and i_upper: the levels in their halves
// i_dot:  adds to every lane the products of these with the bytes of low and of high; exact for values from -127 to 127
// v_from: as floats

#if defined(FASA_AVX512)

using ivec = __m512i;

static inline ivec i_set1(int32_t x)        { return _mm512_set1_epi32(x); }
static inline ivec i_load(const char * p)   { return _mm512_loadu_si512(p); }
static inline vec  v_from(ivec x)           { return _mm512_cvtepi32_ps(x); }
static inline ivec i_lower(ivec x)          { return _mm512_and_si512(x, _mm512_set1_epi8(15)); }
static inline ivec i_upper(ivec x)          { return i_lower(_mm512_srli_epi32(x, 4)); }

static inline ivec i_dot(ivec sum, ivec lower, ivec upper, ivec low, ivec high) {
#if defined(__AVX512VNNI__)
    return _mm512_dpbusd_epi32(_mm512_dpbusd_epi32(sum, lower, low), upper, high);
#else
    // four products of at most 15*127 fit into 16 bits
    const ivec pairs = _mm512_add_epi16(_mm512_maddubs_epi16(lower, low), _mm512_maddubs_epi16(upper, high));
    return _mm512_add_epi32(sum, _mm512_madd_epi16(pairs, _mm512_set1_epi16(1)));
#endif
}

#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)

using ivec = __m256i;

static inline ivec i_set1(int32_t x)        { return _mm256_set1_epi32(x); }
static inline ivec i_load(const char * p)   { return _mm256_loadu_si256((const __m256i *) p); }
static inline vec  v_from(ivec x)           { return _mm256_cvtepi32_ps(x); }
static inline ivec i_lower(ivec x)          { return _mm256_and_si256(x, _mm256_set1_epi8(15)); }
static inline ivec i_upper(ivec x)          { return i_lower(_mm256_srli_epi32(x, 4)); }

static inline ivec i_dot(ivec sum, ivec lower, ivec upper, ivec low, ivec high) {
#if defined(__AVXVNNI__)
    return _mm256_dpbusd_avx_epi32(_mm256_dpbusd_avx_epi32(sum, lower, low), upper, high);
#else
    const ivec pairs = _mm256_add_epi16(_mm256_maddubs_epi16(lower, low), _mm256_maddubs_epi16(upper, high)); // as above
    return _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
#endif
}

#elif defined(__ARM_NEON) && defined(__aarch64__)

using ivec = int32x4_t;

static inline ivec i_set1(int32_t x)        { return vdupq_n_s32(x); }
static inline ivec i_load(const char * p)   { return vreinterpretq_s32_s8(vld1q_s8((const int8_t *) p)); }
static inline vec  v_from(ivec x)           { return vcvtq_f32_s32(x); }
static inline ivec i_lower(ivec x)          { return vandq_s32(x, vdupq_n_s32(0x0F0F0F0F)); }
static inline ivec i_upper(ivec x)          { return vreinterpretq_s32_u8(vshrq_n_u8(vreinterpretq_u8_s32(x), 4)); }

static inline ivec i_dot(ivec sum, ivec lower, ivec upper, ivec low, ivec high) {
    const int8x16_t a[2] = { vreinterpretq_s8_s32(lower), vreinterpretq_s8_s32(upper) };
    const int8x16_t b[2] = { vreinterpretq_s8_s32(low),   vreinterpretq_s8_s32(high) };
#if defined(__ARM_FEATURE_DOTPROD)
    return vdotq_s32(vdotq_s32(sum, a[0], b[0]), a[1], b[1]);
#else
    const int16x8_t first  = vmlal_s8(vmull_s8(vget_low_s8 (a[0]), vget_low_s8 (b[0])), vget_low_s8 (a[1]), vget_low_s8 (b[1]));
    const int16x8_t second = vmlal_s8(vmull_s8(vget_high_s8(a[0]), vget_high_s8(b[0])), vget_high_s8(a[1]), vget_high_s8(b[1]));
    return vaddq_s32(sum, vpaddq_s32(vpaddlq_s16(first), vpaddlq_s16(second)));
#endif
}

#else

struct ivec {
    int32_t lane[FASA_LANES];
};

static inline ivec i_set1(int32_t x) {
    ivec res;
    std::fill(res.lane, res.lane + FASA_LANES, x);
    return res;
}

static inline ivec i_load(const char * p) {
    ivec res;
    memcpy(res.lane, p, sizeof(res.lane));
    return res;
}

static inline ivec i_lower(ivec x) {
    for (int32_t & lane : x.lane) {
        lane &= 0x0F0F0F0F;
    }
    return x;
}

static inline ivec i_upper(ivec x) {
    for (int32_t & lane : x.lane) {
        lane = lane >> 4 & 0x0F0F0F0F;
    }
    return x;
}

static inline ivec i_dot(ivec sum, ivec lower, ivec upper, ivec low, ivec high) {
    int8_t a[2][4*FASA_LANES];
    int8_t b[2][4*FASA_LANES];
    memcpy(a[0], lower.lane, sizeof(a[0]));
    memcpy(a[1], upper.lane, sizeof(a[1]));
    memcpy(b[0], low.lane,   sizeof(b[0]));
    memcpy(b[1], high.lane,  sizeof(b[1]));
    for (int i = 0; i < 4*FASA_LANES; ++i) {
        sum.lane[i/4] += a[0][i]*b[0][i] + a[1][i]*b[1][i];
    }
    return sum;
}

static inline vec v_from(ivec x) {
    return v_map([&](int i) { return (float) x.lane[i]; });
}

#endif
