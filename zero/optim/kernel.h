/* What an update is called with, and the numbers that the C files and native_args.py share. */
#ifndef ZERO_KERNEL_H
#define ZERO_KERNEL_H

#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#if defined(__x86_64__)
#define HAVE_X86 1
#include <cpuid.h>
#include <immintrin.h>
#endif

#define EXPORT __attribute__((visibility("default")))
#define ALWAYS_INLINE static inline __attribute__((always_inline))
#define NOINLINE __attribute__((noinline))

enum { DTYPE_NONE = 0, DTYPE_FP32 = 1, DTYPE_BF16 = 2, DTYPE_FP16 = 3 };
enum { RULE_ADAM = 0, RULE_SGD = 1, RULE_MOMENTUM = 2, RULE_LION = 3 };
enum { FORMAT_FP32 = 0, FORMAT_SPLIT = 1, FORMAT_BF16 = 2, FORMAT_8BIT = 3 };
/* Macros, as the preprocessor compares them. */
#define ISA_GENERIC 0
#define ISA_AVX2 1
#define ISA_AVX512 2
#define ISA_NEON 3

/* One trip of the loop: two cache lines of fp32. */
#define STRIDE ((size_t)32)
/* Elements that share a scale in the 8-bit format. */
#define BLOCK ((size_t)256)
/* What a thread takes at a time, about 1 MB of traffic; a multiple of the block. */
#define GRAIN ((size_t)1 << 16)
/* From here on `out` is written past the caches, worth 10 % of the rate: a step's state will not fit into them anyway.
 * Only where it is not read: the other arrays are in the cache already. */
#define STREAM_MIN ((size_t)1 << 20)
/* How far ahead of the loop to fetch; measured, flat between 256 and 768 elements. */
#define AHEAD ((size_t)256)
/* Threads without OpenMP: enough for any machine that lacks it. */
#define MAX_PLAIN_THREADS 64

#define BF16_NAN 0x7fc0u
#define FP32_INFINITY 0x7f800000u
#define FP32_ABS 0x7fffffffu

/* The scalars of one step, computed in double precision by the caller and rounded to fp32 once, as torch does. */
struct scalars {
  float grad_scale;    /* multiplies the gradient first; negative to maximise */
  float decay;         /* multiplies the weights first: 1 - lr * weight_decay where decay is decoupled, else 1 */
  float l2;            /* this much of the weights is added to the gradient */
  float mean_weight;   /* Adam, Lion: 1 - beta1; SGD: 1 - dampening */
  float decay2;        /* Adam: beta2; SGD: momentum */
  float square_weight; /* Adam, Lion: 1 - beta2 */
  float bias2_root;    /* Adam: sqrt(1 - beta2^step) */
  float eps;           /* Adam */
  float neg_step;      /* Adam: -lr / (1 - beta1^step); SGD, Lion: -lr */
  int32_t first;       /* SGD: the momentum is the gradient itself */
  int32_t nesterov;    /* SGD */
};

/* Pointers are to element 0; an update may begin at any element. What a format or a rule lacks is NULL. */
struct call {
  void *master; /* fp32; in other formats what the upper 16 bits, in `out`, leave of it: 16 bits, or 8 in FORMAT_8BIT */
  void *first, *second;              /* moments; fp32, bf16 or codes of 8 bits */
  float *first_scale, *second_scale; /* FORMAT_8BIT: one for each BLOCK elements */
  const void *grad;
  void *out; /* 16-bit weights; may be `grad`, if both have 16 bits and the format is FORMAT_FP32 */
  int32_t rule, format, grad_dtype, out_dtype;
  uint32_t noise_key[2]; /* of the random numbers of stochastic rounding */
  uint64_t noise_index;  /* of element 0 */
  uint64_t numel;        /* of the arrays */
  struct scalars scalars;
};

ALWAYS_INLINE uint32_t float_bits(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  return bits;
}

ALWAYS_INLINE float bits_float(uint32_t bits) {
  float x;
  memcpy(&x, &bits, sizeof x);
  return x;
}

#endif
