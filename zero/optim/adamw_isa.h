/* The vector operations adamw_step.h is written in, for the instruction set named by ISA_LEVEL. Included repeatedly. */
#undef NAME
#undef TARGET
#undef LANES
#undef CAN_STREAM
#undef VEC
#undef SET1
#undef ADD
#undef SUB
#undef MUL
#undef DIV
#undef SQRT
#undef FMA

#if ISA_LEVEL == ISA_AVX512

#define NAME(x) x##_avx512
#define TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")))
#define LANES 16
#define CAN_STREAM 1
#define VEC __m512
#define SET1 _mm512_set1_ps
#define ADD _mm512_add_ps
#define SUB _mm512_sub_ps
#define MUL _mm512_mul_ps
#define DIV _mm512_div_ps
#define SQRT _mm512_sqrt_ps
#define FMA _mm512_fmadd_ps

TARGET ALWAYS_INLINE VEC NAME(load_fp32)(const float *p) { return _mm512_loadu_ps(p); }
TARGET ALWAYS_INLINE void NAME(store_fp32)(float *p, VEC x) { _mm512_storeu_ps(p, x); }

TARGET ALWAYS_INLINE VEC NAME(load_bf16)(const uint16_t *p) {
  __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)p));
  return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}

TARGET ALWAYS_INLINE VEC NAME(load_fp16)(const uint16_t *p) {
  return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)p));
}

/* Not vcvtneps2bf16: that flushes denormals to zero. */
TARGET ALWAYS_INLINE __m256i NAME(round_bf16)(VEC x) {
  __m512i bits = _mm512_castps_si512(x);
  __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
  __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
  rounded = _mm512_mask_mov_epi32(rounded, nan, _mm512_set1_epi32(BF16_NAN << 16));
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16));
}

TARGET ALWAYS_INLINE __m256i NAME(round_fp16)(VEC x) { return _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT); }

TARGET ALWAYS_INLINE void NAME(store_16bit)(uint16_t *p, VEC x, int dtype, int stream) {
  __m256i half = dtype == DTYPE_BF16 ? NAME(round_bf16)(x) : NAME(round_fp16)(x);
  if (stream)
    _mm256_stream_si256((__m256i *)p, half);
  else
    _mm256_storeu_si256((__m256i *)p, half);
}

#elif ISA_LEVEL == ISA_AVX2

#define NAME(x) x##_avx2
#define TARGET __attribute__((target("avx2,fma,f16c")))
#define LANES 8
#define CAN_STREAM 1
#define VEC __m256
#define SET1 _mm256_set1_ps
#define ADD _mm256_add_ps
#define SUB _mm256_sub_ps
#define MUL _mm256_mul_ps
#define DIV _mm256_div_ps
#define SQRT _mm256_sqrt_ps
#define FMA _mm256_fmadd_ps

TARGET ALWAYS_INLINE VEC NAME(load_fp32)(const float *p) { return _mm256_loadu_ps(p); }
TARGET ALWAYS_INLINE void NAME(store_fp32)(float *p, VEC x) { _mm256_storeu_ps(p, x); }

TARGET ALWAYS_INLINE VEC NAME(load_bf16)(const uint16_t *p) {
  __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)p));
  return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
}

TARGET ALWAYS_INLINE VEC NAME(load_fp16)(const uint16_t *p) {
  return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)p));
}

TARGET ALWAYS_INLINE __m128i NAME(round_bf16)(VEC x) {
  __m256i bits = _mm256_castps_si256(x);
  __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  __m256i rounded = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
  __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
  rounded = _mm256_blendv_epi8(rounded, _mm256_set1_epi32(BF16_NAN << 16), nan);
  rounded = _mm256_srli_epi32(rounded, 16);
  return _mm_packus_epi32(_mm256_castsi256_si128(rounded), _mm256_extracti128_si256(rounded, 1));
}

TARGET ALWAYS_INLINE __m128i NAME(round_fp16)(VEC x) { return _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT); }

TARGET ALWAYS_INLINE void NAME(store_16bit)(uint16_t *p, VEC x, int dtype, int stream) {
  __m128i half = dtype == DTYPE_BF16 ? NAME(round_bf16)(x) : NAME(round_fp16)(x);
  if (stream)
    _mm_stream_si128((__m128i *)p, half);
  else
    _mm_storeu_si128((__m128i *)p, half);
}

#else /* one element at a time; the compiler turns the loop into what its baseline offers */

#define NAME(x) x##_generic
#define TARGET
#define LANES 1
#define CAN_STREAM 0
#define VEC float
#define SET1(x) (x)
#define ADD(a, b) ((a) + (b))
#define SUB(a, b) ((a) - (b))
#define MUL(a, b) ((a) * (b))
#define DIV(a, b) ((a) / (b))
#define SQRT(x) sqrtf(x)
#ifdef __FP_FAST_FMAF
#define FMA(a, b, c) __builtin_fmaf(a, b, c)
#else /* a library call per element would be far too slow */
#define FMA(a, b, c) ((a) * (b) + (c))
#endif

ALWAYS_INLINE VEC NAME(load_fp32)(const float *p) { return *p; }
ALWAYS_INLINE void NAME(store_fp32)(float *p, VEC x) { *p = x; }
ALWAYS_INLINE VEC NAME(load_bf16)(const uint16_t *p) { return bits_float((uint32_t)*p << 16); }

ALWAYS_INLINE uint16_t NAME(round_bf16)(VEC x) {
  uint32_t bits = float_bits(x);
  uint32_t rounded = (bits + 0x7fffu + (bits >> 16 & 1)) >> 16;
  return (uint16_t)((bits & 0x7fffffffu) > 0x7f800000u ? BF16_NAN : rounded);
}

#ifdef __ARM_FP16_FORMAT_IEEE /* the processor converts */

ALWAYS_INLINE VEC NAME(load_fp16)(const uint16_t *p) {
  __fp16 half;
  memcpy(&half, p, sizeof half);
  return half;
}

ALWAYS_INLINE uint16_t NAME(round_fp16)(VEC x) {
  __fp16 half = (__fp16)x;
  uint16_t bits;
  memcpy(&bits, &half, sizeof bits);
  return bits;
}

#else

/* Scaling by 2^112 rebases the exponent and makes denormals normal, with no branch. */
ALWAYS_INLINE VEC NAME(load_fp16)(const uint16_t *p) {
  uint32_t magnitude = (uint32_t)(*p & 0x7fff) << 13;
  uint32_t scaled = float_bits(bits_float(magnitude) * 0x1p112f);
  uint32_t bits = magnitude >= 0x0f800000u ? magnitude | 0x7f800000u : scaled; /* infinity and NaN */
  return bits_float(bits | (uint32_t)(*p & 0x8000) << 16);
}

ALWAYS_INLINE uint16_t NAME(round_fp16)(VEC x) {
  uint32_t bits = float_bits(x), sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffffu;
  uint32_t normal = (magnitude - 0x38000000u + 0xfffu + (magnitude >> 13 & 1)) >> 13;
  /* Adding 0.5 puts the bits of a value below 2^-14 at the end of the mantissa, rounded to nearest even. */
  uint32_t denormal = float_bits(bits_float(magnitude) + 0.5f) - 0x3f000000u;
  uint32_t half = magnitude < 0x38800000u ? denormal : normal;
  half = magnitude >= 0x477ff000u ? 0x7c00u : half;
  return (uint16_t)(sign | (magnitude > 0x7f800000u ? 0x7e00u : half));
}

#endif

ALWAYS_INLINE void NAME(store_16bit)(uint16_t *p, VEC x, int dtype, int stream) {
  (void)stream;
  *p = dtype == DTYPE_BF16 ? NAME(round_bf16)(x) : NAME(round_fp16)(x);
}

#endif
