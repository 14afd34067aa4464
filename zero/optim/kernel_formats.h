/* From what lies in memory to fp32 and back, a block at a time. Included once for each ISA_LEVEL.
 *
 * zero/optim/formats.py says the same in torch, and what each format is for.
 */

/* -- 16-bit floats --------------------------------------------------------------------------------------------------*/

TARGET ALWAYS_INLINE uint32_t NAME(round_bf16)(uint32_t bits) {
  /* Not vcvtneps2bf16: that flushes denormals to zero. */
  uint32_t rounded = (bits + 0x7fffu + (bits >> 16 & 1)) >> 16;
  return (bits & FP32_ABS) > FP32_INFINITY ? BF16_NAN : rounded;
}

/* The processor converts; compilers do not see that by themselves. What is stored here is read in whole vectors next: two
 * smaller stores would make that wait. */
#if ISA_LEVEL == ISA_AVX512

TARGET ALWAYS_INLINE void NAME(widen_fp16s)(float *restrict x, const uint16_t *restrict from) {
  for (size_t j = 0; j < STRIDE; j += 16)
    _mm512_storeu_ps(x + j, _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)(from + j))));
}

TARGET ALWAYS_INLINE void NAME(round_fp16s)(uint16_t *restrict to, const float *restrict x) {
  for (size_t j = 0; j < STRIDE; j += 16)
    _mm256_storeu_si256((__m256i *)(to + j), _mm512_cvtps_ph(_mm512_loadu_ps(x + j), _MM_FROUND_TO_NEAREST_INT));
}

#elif ISA_LEVEL == ISA_AVX2

TARGET ALWAYS_INLINE void NAME(widen_fp16s)(float *restrict x, const uint16_t *restrict from) {
  for (size_t j = 0; j < STRIDE; j += 8)
    _mm256_storeu_ps(x + j, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(from + j))));
}

TARGET ALWAYS_INLINE void NAME(round_fp16s)(uint16_t *restrict to, const float *restrict x) {
  for (size_t j = 0; j < STRIDE; j += 8)
    _mm_storeu_si128((__m128i *)(to + j), _mm256_cvtps_ph(_mm256_loadu_ps(x + j), _MM_FROUND_TO_NEAREST_INT));
}

#else

#ifdef __ARM_FP16_FORMAT_IEEE /* so does this one */

ALWAYS_INLINE float NAME(widen_fp16)(uint16_t bits) {
  __fp16 half;
  memcpy(&half, &bits, sizeof half);
  return half;
}

ALWAYS_INLINE uint16_t NAME(round_fp16)(float x) {
  __fp16 half = (__fp16)x;
  uint16_t bits;
  memcpy(&bits, &half, sizeof bits);
  return bits;
}

#else

TARGET ALWAYS_INLINE float NAME(widen_fp16)(uint16_t half) {
  uint32_t magnitude = half & 0x7fffu;
  uint32_t normal = (magnitude << 13) + (magnitude >= 0x7c00u ? 0x70000000u : 0x38000000u);
  /* By way of an integer: a multiplication of denormals is slow, and zero where a program asked to flush them. */
  uint32_t denormal = float_bits((float)(int32_t)magnitude * 0x1p-24f);
  return bits_float((magnitude < 0x400u ? denormal : normal) | (uint32_t)(half & 0x8000u) << 16);
}

TARGET ALWAYS_INLINE uint16_t NAME(round_fp16)(float x) {
  uint32_t bits = float_bits(x), sign = bits >> 16 & 0x8000, magnitude = bits & FP32_ABS;
  uint32_t normal = (magnitude - 0x38000000u + 0xfffu + (magnitude >> 13 & 1)) >> 13;
  /* Adding 0.5 puts the bits of a value below 2^-14 at the end of the mantissa, rounded to nearest even. */
  uint32_t denormal = float_bits(bits_float(magnitude) + 0.5f) - 0x3f000000u;
  uint32_t half = magnitude < 0x38800000u ? denormal : normal;
  half = magnitude >= 0x477ff000u ? 0x7c00u : half;
  return (uint16_t)(sign | (magnitude > FP32_INFINITY ? 0x7e00u : half));
}

#endif

TARGET static NOINLINE void NAME(widen_fp16s)(float *restrict x, const uint16_t *restrict from) {
  for (size_t j = 0; j < STRIDE; j++) x[j] = NAME(widen_fp16)(from[j]);
}

TARGET static NOINLINE void NAME(round_fp16s)(uint16_t *restrict to, const float *restrict x) {
  for (size_t j = 0; j < STRIDE; j++) to[j] = NAME(round_fp16)(x[j]);
}

#endif

TARGET ALWAYS_INLINE void NAME(widen)(float *restrict x, const uint16_t *restrict from, int dtype) {
  if (dtype == DTYPE_FP16) return NAME(widen_fp16s)(x, from);
  for (size_t j = 0; j < STRIDE; j++) x[j] = bits_float((uint32_t)from[j] << 16);
}

TARGET ALWAYS_INLINE void NAME(narrow)(uint16_t *restrict to, const float *restrict x, int dtype) {
  if (dtype == DTYPE_FP16) return NAME(round_fp16s)(to, x);
  for (size_t j = 0; j < STRIDE; j++) to[j] = (uint16_t)NAME(round_bf16)(float_bits(x[j]));
}

/* -- masters of 32 and of 24 bits, in two parts ---------------------------------------------------------------------*/

/* The weights are the master rounded to nearest even, `low` is what is missing. A tie that was rounded down misses 0x8000,
 * one more than 16 bits with a sign hold: the sign of the second moment, which has no other use, tells it from -0x8000. */
TARGET ALWAYS_INLINE void NAME(join_split)(float *restrict p, float *restrict v, const uint16_t *restrict up,
                                           const int16_t *restrict low, const float *restrict second) {
  for (size_t j = 0; j < STRIDE; j++) {
    uint32_t bits = float_bits(second[j]);
    p[j] = bits_float(((uint32_t)up[j] << 16) + (uint32_t)(int32_t)low[j] + (bits >> 31 << 16));
    v[j] = bits_float(bits & FP32_ABS);
  }
}

TARGET ALWAYS_INLINE void NAME(part_split)(uint16_t *restrict up, int16_t *restrict low, float *restrict second,
                                           const float *restrict p, const float *restrict v) {
  for (size_t j = 0; j < STRIDE; j++) {
    uint32_t bits = float_bits(p[j]), upper = NAME(round_bf16)(bits), rest = bits - (upper << 16);
    rest = (bits & FP32_ABS) > FP32_INFINITY ? 0 : rest;
    up[j] = (uint16_t)upper;
    low[j] = (int16_t)(uint16_t)rest;
    second[j] = bits_float((float_bits(v[j]) & FP32_ABS) | (rest == 0x8000u ? 0x80000000u : 0));
  }
}

/* Without a sign to spare, in formats that are not exact anyway, ties of the weights go up, away from zero. */
TARGET ALWAYS_INLINE uint32_t NAME(round_half_up)(uint32_t bits) {
  return (bits & FP32_ABS) > FP32_INFINITY ? BF16_NAN : (bits + 0x8000u) >> 16;
}

TARGET ALWAYS_INLINE void NAME(join_16)(float *restrict p, const uint16_t *restrict up, const int16_t *restrict low) {
  for (size_t j = 0; j < STRIDE; j++) p[j] = bits_float(((uint32_t)up[j] << 16) + (uint32_t)(int32_t)low[j]);
}

TARGET ALWAYS_INLINE void NAME(part_16)(uint16_t *restrict up, int16_t *restrict low, const float *restrict p) {
  for (size_t j = 0; j < STRIDE; j++) {
    uint32_t bits = float_bits(p[j]), upper = NAME(round_half_up)(bits), rest = bits - (upper << 16);
    up[j] = (uint16_t)upper;
    low[j] = (int16_t)(uint16_t)((bits & FP32_ABS) > FP32_INFINITY ? 0 : rest);
  }
}

/* Bytes are widened and narrowed in loops of their own: mixed with wider numbers they make poor vector code. */
TARGET ALWAYS_INLINE void NAME(widen_bytes)(uint32_t *restrict x, const uint8_t *restrict bytes) {
#if ISA_LEVEL == ISA_AVX512 /* see widen_fp16s */
  for (size_t j = 0; j < STRIDE; j += 16)
    _mm512_storeu_si512(x + j, _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)(bytes + j))));
#else
  for (size_t j = 0; j < STRIDE; j++) x[j] = bytes[j];
#endif
}

TARGET ALWAYS_INLINE void NAME(narrow_to_bytes)(uint8_t *restrict bytes, const uint32_t *restrict x) {
  for (size_t j = 0; j < STRIDE; j++) bytes[j] = (uint8_t)x[j];
}

TARGET ALWAYS_INLINE void NAME(join_8)(float *restrict p, const uint16_t *restrict up, const uint8_t *restrict low) {
  uint32_t wide[STRIDE];
  NAME(widen_bytes)(wide, low);
  for (size_t j = 0; j < STRIDE; j++) p[j] = bits_float(((uint32_t)up[j] << 16) + ((wide[j] ^ 0x80u) << 8) - 0x8000u);
}

TARGET ALWAYS_INLINE void NAME(part_8)(uint16_t *restrict up, uint8_t *restrict low, const float *restrict p,
                                       const uint32_t *restrict noise) {
  uint32_t wide[STRIDE];
  for (size_t j = 0; j < STRIDE; j++) {
    uint32_t bits = float_bits(p[j]), rounded = (bits + (noise[j] >> 24)) & ~0xffu;
    uint32_t is_nan = (bits & FP32_ABS) > FP32_INFINITY;
    uint32_t upper = is_nan ? BF16_NAN : (rounded + 0x8000u) >> 16;
    up[j] = (uint16_t)upper;
    wide[j] = is_nan ? 0 : (rounded - (upper << 16)) >> 8;
  }
  NAME(narrow_to_bytes)(low, wide);
}

/* -- moments, rounded at random: up as often as they are near the upper neighbour -----------------------------------*/

/* 32 random bits for each element. They depend on the key and on the element's index alone. */
TARGET static NOINLINE void NAME(make_noise)(uint32_t *restrict noise, const uint32_t *key, uint64_t index) {
  const uint32_t start = (uint32_t)index, high = (uint32_t)(index >> 32), key1 = key[1];
  const uint32_t salt = mix(key[0] + high * 0x9e3779b9u), next = mix(key[0] + (high + 1) * 0x9e3779b9u);
  for (size_t j = 0; j < STRIDE; j++) {
    uint32_t low = start + (uint32_t)j;
    uint32_t x = low ^ (low < start ? next : salt);
    x = (x ^ x >> 16) * 0x7feb352du + key1;
    x = (x ^ x >> 15) * 0x846ca68bu;
    noise[j] = x ^ x >> 16;
  }
}

TARGET ALWAYS_INLINE void NAME(round_moments)(uint16_t *restrict first, uint16_t *restrict second,
                                              const float *restrict m, const float *restrict v,
                                              const uint32_t *restrict noise) {
  for (size_t j = 0; j < STRIDE; j++) {
    uint32_t mean = float_bits(m[j]), square = float_bits(v[j]);
    uint32_t mean_up = (mean + (noise[j] & 0xffffu)) >> 16, square_up = (square + (noise[j] >> 16)) >> 16;
    first[j] = (uint16_t)((mean & FP32_ABS) > FP32_INFINITY ? BF16_NAN : mean_up);
    second[j] = (uint16_t)((square & FP32_ABS) > FP32_INFINITY ? BF16_NAN : square_up);
  }
}

/* Codes of 8 bits are small floats of 4 explicit bits, to be multiplied by a power of two that the block shares. The first
 * moment: sign, 3 bits of exponent, denormals; the second: 4 bits of exponent, and code 0 is the smallest value, not zero,
 * so that no weight is divided by a second moment that was rounded away. */
#define MEAN_BASE (119u << 23)
#define SQUARE_BASE (111u << 23)

TARGET ALWAYS_INLINE void NAME(widen_codes)(float *restrict m, float *restrict v, const uint8_t *restrict first,
                                            const uint8_t *restrict second, float first_scale, float second_scale) {
  uint32_t code[STRIDE], code2[STRIDE];
  NAME(widen_bytes)(code, first);
  NAME(widen_bytes)(code2, second);
  for (size_t j = 0; j < STRIDE; j++) {
    uint32_t magnitude = code[j] & 0x7fu;
    float normal = bits_float((magnitude << 19) + MEAN_BASE), denormal = (float)(int32_t)magnitude * 0x1p-11f;
    float mean = (magnitude < 16 ? denormal : normal) * first_scale;
    m[j] = bits_float(float_bits(mean) | (code[j] & 0x80u) << 24);
    v[j] = bits_float((code2[j] << 19) + SQUARE_BASE) * second_scale;
  }
}

TARGET ALWAYS_INLINE void NAME(narrow_to_codes)(uint8_t *restrict first, uint8_t *restrict second,
                                                const float *restrict m, const float *restrict v, float first_inverse,
                                                float second_inverse, const uint32_t *restrict noise) {
  uint32_t code[STRIDE], code2[STRIDE];
  for (size_t j = 0; j < STRIDE; j++) {
    float mean = bits_float(float_bits(m[j]) & FP32_ABS) * first_inverse;
    float square = v[j] * second_inverse;
    int32_t place = mean < 0x1p-7f ? (int32_t)(mean * 0x1p30f) : (int32_t)(float_bits(mean) - MEAN_BASE);
    int32_t place2 = square < 0x1p-16f ? 0 : (int32_t)(float_bits(square) - SQUARE_BASE);
    /* 12 random bits where 19 would do, and half of the least so that they are right on average. */
    place = (place + (int32_t)((noise[j] & 0xfffu) << 7 | 0x40u)) >> 19;
    place2 = (place2 + (int32_t)((noise[j] >> 12 & 0xfffu) << 7 | 0x40u)) >> 19;
    code[j] = (uint32_t)(place > 127 ? 127 : place) | (float_bits(m[j]) >> 24 & 0x80u);
    code2[j] = (uint32_t)(place2 > 255 ? 255 : place2);
  }
  NAME(narrow_to_bytes)(first, code);
  NAME(narrow_to_bytes)(second, code2);
}

/* Bits of the greatest magnitude; those of NaN are greater than any. */
TARGET ALWAYS_INLINE uint32_t NAME(greatest)(const float *restrict x) {
  uint32_t most = 0;
  for (size_t j = 0; j < BLOCK; j++) {
    uint32_t bits = float_bits(x[j]) & FP32_ABS;
    most = bits > most ? bits : most;
  }
  return most;
}
