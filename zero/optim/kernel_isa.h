/* How the functions of one instruction set are named and compiled. Included repeatedly, with another ISA_LEVEL.
 *
 * The loops are plain C over blocks of a fixed length, which gcc and clang turn into vector code of the target; only
 * conversions of fp16 and of bytes need intrinsics. On aarch64 "generic" is compiled for the baseline, which has NEON and fused
 * multiply-add.
 */
#undef NAME
#undef TARGET
#undef FMA

#if ISA_LEVEL == ISA_AVX512
#define NAME(x) x##_avx512
#ifdef __clang__
#define TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")))
#else
#define TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,prefer-vector-width=512")))
#endif
#define FMA(a, b, c) __builtin_fmaf(a, b, c)

#elif ISA_LEVEL == ISA_AVX2
#define NAME(x) x##_avx2
#define TARGET __attribute__((target("avx2,fma,f16c")))
#define FMA(a, b, c) __builtin_fmaf(a, b, c)

#else
#define NAME(x) x##_generic
#define TARGET
#ifdef __FP_FAST_FMAF
#define FMA(a, b, c) __builtin_fmaf(a, b, c)
#else /* a library call per element would be far too slow */
#define FMA(a, b, c) ((a) * (b) + (c))
#endif
#endif
