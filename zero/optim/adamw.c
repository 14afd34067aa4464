/* AdamW on the CPU in one pass: low-precision gradient in, fp32 master and moments, low-precision weights out.
 *
 * Plain C without the headers of any framework, so any C compiler builds it in seconds. The step itself is in
 * adamw_step.h, included below once for each instruction set; which copy runs is decided at run time, because the
 * build cache may lie in a home folder that machines of several kinds share.
 *
 * Every element goes through the operations of torch.optim.AdamW's single-tensor loop, in its order and with the fused
 * multiply-adds of torch's vector code. Hence the result of an element depends neither on its place in the array nor on
 * the number of threads, and AVX2 and AVX-512 agree to the bit.
 */
#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#ifndef _OPENMP
#include <pthread.h>
#endif

#if defined(__x86_64__)
#define HAVE_X86 1
#include <cpuid.h>
#include <immintrin.h>
#endif

#define EXPORT __attribute__((visibility("default")))
#define ALWAYS_INLINE static inline __attribute__((always_inline))

enum { DTYPE_NONE = 0, DTYPE_FP32 = 1, DTYPE_BF16 = 2, DTYPE_FP16 = 3 };
/* Macros, as the preprocessor compares them. */
#define ISA_GENERIC 0
#define ISA_AVX2 1
#define ISA_AVX512 2

/* One vector loop body: two lines of fp32. */
#define BLOCK_NUMEL ((size_t)32)
/* What a thread takes at a time, about 1 MB of traffic; a multiple of the block. */
#define GRAIN_NUMEL ((size_t)1 << 16)
/* From here on `out` is written past the caches: a step's state will not fit into them anyway. */
#define STREAM_MIN_NUMEL ((size_t)1 << 20)
/* How far ahead of the loop to fetch; measured, flat between 1 and 3 KiB. */
#define PREFETCH_BYTES 1024
/* Threads without OpenMP: enough for any machine that lacks it. */
#define MAX_PLAIN_THREADS 64

#define BF16_NAN 0x7fc0u

/* The scalars of one step, computed in double precision by the caller and rounded to fp32 once, as torch does. */
struct adamw_scalars {
  float grad_scale;    /* multiplies the gradient first; negative to maximise */
  float decay;         /* 1 - lr * weight_decay for AdamW, else 1 */
  float l2;            /* weight_decay for Adam with L2 regularisation, else 0 */
  float mean_weight;   /* 1 - beta1 */
  float beta2;
  float square_weight; /* 1 - beta2 */
  float bias2_root;    /* sqrt(1 - beta2^step) */
  float eps;
  float neg_step;      /* -lr / (1 - beta1^step) */
};

struct adamw_call {
  float *master, *exp_avg, *exp_avg_sq;
  const void *grad;
  void *out; /* may be `grad`, if both have 16 bits */
  int32_t grad_dtype, out_dtype;
  struct adamw_scalars scalars;
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

#define ISA_LEVEL ISA_GENERIC
#include "adamw_step.h"
#ifdef HAVE_X86
#undef ISA_LEVEL
#define ISA_LEVEL ISA_AVX2
#include "adamw_step.h"
#undef ISA_LEVEL
#define ISA_LEVEL ISA_AVX512
#include "adamw_step.h"
#endif

#ifdef HAVE_X86
/* gcc 10 does not know __builtin_cpu_supports("f16c"). AVX2, always asked for beside it, covers the system's part. */
static int has_f16c(void) {
  unsigned eax, ebx, ecx, edx;
  return __get_cpuid(1, &eax, &ebx, &ecx, &edx) && (ecx & bit_F16C);
}

static int has_avx2(void) {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c();
}

static int has_avx512(void) {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
#endif

/* Whether both the processor and the operating system can run this copy of the step. */
EXPORT int zero_supports_isa(int isa) {
#ifdef HAVE_X86
  __builtin_cpu_init();
  if (isa == ISA_AVX512) return has_avx512();
  if (isa == ISA_AVX2) return has_avx2();
#endif
  return isa == ISA_GENERIC;
}

/* 1 if threads come from OpenMP, 0 if they are started for each call. */
EXPORT int zero_uses_openmp(void) {
#ifdef _OPENMP
  return 1;
#else
  return 0;
#endif
}

typedef void (*update_fn)(const struct adamw_call *, size_t begin, size_t end, int stream);

static update_fn update_for(int isa) {
#ifdef HAVE_X86
  if (isa == ISA_AVX512) return update_avx512;
  if (isa == ISA_AVX2) return update_avx2;
#endif
  (void)isa;
  return update_generic;
}

/* One call's work, shared by its threads. */
struct job {
  const struct adamw_call *call;
  update_fn update;
  size_t next, numel; /* the first element nobody has taken; the end */
  int stream;
};

/* Take grains until none is left: a thread on a busy core then takes fewer. */
static void *work(void *shared) {
  struct job *job = shared;
  for (;;) {
    size_t begin = __atomic_fetch_add(&job->next, GRAIN_NUMEL, __ATOMIC_RELAXED);
    if (begin >= job->numel) return NULL;
    size_t left = job->numel - begin;
    job->update(job->call, begin, begin + (left < GRAIN_NUMEL ? left : GRAIN_NUMEL), job->stream);
  }
}

static void work_on_threads(struct job *job, int num_threads) {
#ifdef _OPENMP
#pragma omp parallel num_threads(num_threads)
  work(job);
#else
  pthread_t threads[MAX_PLAIN_THREADS];
  int started = 0;
  if (num_threads > MAX_PLAIN_THREADS) num_threads = MAX_PLAIN_THREADS;
  /* A thread that cannot be started costs speed only: the caller's own loop below ends when all is done. */
  while (started < num_threads - 1 && pthread_create(&threads[started], NULL, work, job) == 0) started++;
  work(job);
  for (int i = 0; i < started; i++) pthread_join(threads[i], NULL);
#endif
}

/* Step `numel` elements in place. `isa` must be one that zero_supports_isa() confirms. */
EXPORT void zero_adamw(const struct adamw_call *call, size_t numel, int isa, int num_threads) {
  struct job job = {call, update_for(isa), 0, numel, 0};
  uintptr_t out = (uintptr_t)call->out;
  if (call->out_dtype != DTYPE_NONE && numel >= STREAM_MIN_NUMEL && out % 2 == 0) {
    /* Streaming stores need `out` aligned: the elements before its first full line go the plain way. */
    job.stream = 1;
    job.next = (64 - out % 64) % 64 / 2;
    job.update(call, 0, job.next, 0);
  }
  size_t num_grains = (numel - job.next + GRAIN_NUMEL - 1) / GRAIN_NUMEL;
  if (num_threads < 2 || num_grains < 2)
    work(&job);
  else
    work_on_threads(&job, (size_t)num_threads < num_grains ? num_threads : (int)num_grains);
}
