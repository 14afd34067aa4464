/* Optimizer steps on the CPU in one pass: low-precision gradient in, master and moments, low-precision weights out.
 *
 * Plain C without the headers of any framework, so any C compiler builds it in seconds. What depends on the instruction
 * set is in kernel_update.h, included below once for each; which copy runs is decided at run time, because the build
 * cache may lie in a home folder that machines of several kinds share.
 */
#include "kernel.h"
#ifndef _OPENMP
#include <pthread.h>
#endif

/* -- the arrays of a call -------------------------------------------------------------------------------------------*/

#define NUM_ARRAYS 5
#define GRAD 3

/* Bytes of an element of master, first, second, grad and out; 0 where there is no such array. */
ALWAYS_INLINE void find_bytes(const struct call *c, int rule, int format, size_t *bytes) {
  const size_t low = format == FORMAT_FP32 ? 4 : format == FORMAT_8BIT ? 1 : 2;
  const size_t moment = format == FORMAT_BF16 ? 2 : format == FORMAT_8BIT ? 1 : 4;
  bytes[0] = low;
  bytes[1] = rule == RULE_SGD ? 0 : moment;
  bytes[2] = rule == RULE_ADAM ? moment : 0;
  bytes[3] = c->grad_dtype == DTYPE_FP32 ? 4 : 2;
  bytes[4] = c->out_dtype == DTYPE_NONE ? 0 : 2;
}

/* The hardware prefetchers stop at each 4 KiB page, and four streams cross pages at once here: worth a sixth of the rate. */
ALWAYS_INLINE void fetch_ahead_of(const void *array, size_t i, size_t bytes) {
  const char *place = (const char *)array + (i + AHEAD) * bytes;
  if (bytes) __builtin_prefetch(place);
  if (bytes * STRIDE > 64) __builtin_prefetch(place + 64);
}

ALWAYS_INLINE void fetch_ahead(const struct call *c, size_t i, int rule, int format) {
  size_t bytes[NUM_ARRAYS];
  find_bytes(c, rule, format, bytes);
  fetch_ahead_of(c->master, i, bytes[0]);
  fetch_ahead_of(c->first, i, bytes[1]);
  fetch_ahead_of(c->second, i, bytes[2]);
  fetch_ahead_of(c->grad, i, bytes[3]);
  if (format != FORMAT_FP32) fetch_ahead_of(c->out, i, bytes[4]); /* else only written */
}

/* Copy `numel` elements from i on into `room`, which becomes the arrays of `copy`; or back, where they are written. */
static void exchange_arrays(const struct call *c, struct call *copy, void *room, size_t i, size_t numel, int back) {
  char *arrays[NUM_ARRAYS] = {c->master, c->first, c->second, (char *)c->grad, c->out};
  void **copies[NUM_ARRAYS] = {&copy->master, &copy->first, &copy->second, (void **)&copy->grad, &copy->out};
  const size_t room_bytes = (c->format == FORMAT_8BIT ? BLOCK : STRIDE) * 4;
  size_t bytes[NUM_ARRAYS];
  find_bytes(c, c->rule, c->format, bytes);
  for (int k = 0; k < NUM_ARRAYS; k++) {
    char *place = (char *)room + (size_t)k * room_bytes;
    *copies[k] = place;
    if (bytes[k] && !back) memcpy(place, arrays[k] + i * bytes[k], numel * bytes[k]);
    if (bytes[k] && back && k != GRAD) memcpy(arrays[k] + i * bytes[k], place, numel * bytes[k]);
  }
}

static void put_back(float *x, const float *old, size_t begin, size_t end) {
  memcpy(x, old, begin * sizeof *x);
  memcpy(x + end, old + end, (BLOCK - end) * sizeof *x);
}

/* From the copy of a block back: weights and what is missing of the master within the range, codes everywhere. */
static void exchange_weights(const struct call *c, const struct call *copy, size_t i, size_t begin, size_t end) {
  const size_t numel = c->numel - i < BLOCK ? c->numel - i : BLOCK;
  memcpy((uint16_t *)c->out + i + begin, (uint16_t *)copy->out + begin, (end - begin) * 2);
  memcpy((int8_t *)c->master + i + begin, (int8_t *)copy->master + begin, end - begin);
  memcpy((uint8_t *)c->first + i, copy->first, numel);
  memcpy((uint8_t *)c->second + i, copy->second, numel);
}

/* -- what instruction sets share ------------------------------------------------------------------------------------*/

/* STRIDE 16-bit numbers, a cache line. */
ALWAYS_INLINE void store_past_caches(uint16_t *out, const uint16_t *half) {
#ifdef HAVE_X86
  for (size_t j = 0; j < STRIDE; j += 8)
    _mm_stream_si128((__m128i *)(out + j), _mm_load_si128((const __m128i *)(half + j)));
#else /* processors of other kinds see for themselves that whole lines are written */
  memcpy(out, half, STRIDE * 2);
#endif
}

/* Such stores are not ordered by themselves. */
ALWAYS_INLINE void end_of_stores(void) {
#ifdef HAVE_X86
  _mm_sfence();
#endif
}

ALWAYS_INLINE uint32_t mix(uint32_t x) {
  x = (x ^ x >> 16) * 0x7feb352du;
  x = (x ^ x >> 15) * 0x846ca68bu;
  return x ^ x >> 16;
}

/* The power of two that brings a magnitude of these bits to 31/32 or less, the greatest number a code of 8 bits has. */
ALWAYS_INLINE float scale_for(uint32_t most) {
  uint32_t scale = ((most + 0x7ffffu) & FP32_INFINITY) + (1u << 23);
  if (most >= 0x7e000000u) return bits_float(BF16_NAN << 16); /* from 2^125 on the scale has no inverse */
  return most < 27u << 23 ? 0.0f : bits_float(scale); /* below 2^-100: zero */
}

ALWAYS_INLINE float inverse_of(float scale) {
  uint32_t bits = float_bits(scale);
  return bits == 0 || bits > FP32_INFINITY ? 0.0f : bits_float((254u << 23) - bits);
}

#define ISA_LEVEL ISA_GENERIC
#include "kernel_update.h"
#ifdef HAVE_X86
#undef ISA_LEVEL
#define ISA_LEVEL ISA_AVX2
#include "kernel_update.h"
#undef ISA_LEVEL
#define ISA_LEVEL ISA_AVX512
#include "kernel_update.h"
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
#ifdef __aarch64__
  return isa == ISA_NEON;
#else
  return isa == ISA_GENERIC;
#endif
}

/* 1 if threads come from OpenMP, 0 if they are started for each call. */
EXPORT int zero_uses_openmp(void) {
#ifdef _OPENMP
  return 1;
#else
  return 0;
#endif
}

typedef void (*update_fn)(const struct call *, size_t begin, size_t end, int stream);

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
  const struct call *call;
  update_fn update;
  size_t next, end; /* the first element nobody has taken */
  int stream;
};

/* Take grains until none is left: a thread on a busy core then takes fewer. */
static void *work(void *shared) {
  struct job *job = shared;
  for (;;) {
    size_t begin = __atomic_fetch_add(&job->next, GRAIN, __ATOMIC_RELAXED);
    if (begin >= job->end) return NULL;
    size_t left = job->end - begin;
    job->update(job->call, begin, begin + (left < GRAIN ? left : GRAIN), job->stream);
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

/* The elements from `begin` on that come first, so that what follows is aligned: to cache lines, or to a block. */
static size_t first_numel(const struct call *c, size_t begin) {
  if (c->format == FORMAT_8BIT) return (BLOCK - begin % BLOCK) % BLOCK;
  const size_t itemsize = c->out_dtype == DTYPE_NONE ? 4 : 2;
  const uintptr_t place = (uintptr_t)(c->out_dtype == DTYPE_NONE ? c->master : c->out) + begin * itemsize;
  return place % itemsize ? 0 : (64 - place % 64) % 64 / itemsize;
}

/* Update elements [begin, end) in place. `isa` must be one that zero_supports_isa() confirms. */
EXPORT void zero_update(const struct call *call, size_t begin, size_t end, int isa, int num_threads) {
  struct job job = {call, update_for(isa), begin, end, 0};
  size_t head = first_numel(call, begin);
  if (head > end - begin) head = end - begin;
  job.update(call, begin, begin + head, 0);
  job.next = begin + head;
  job.stream = end - begin >= STREAM_MIN && call->out_dtype != DTYPE_NONE && (uintptr_t)call->out % 2 == 0;
  size_t num_grains = (end - job.next + GRAIN - 1) / GRAIN;
  if (num_threads < 2 || num_grains < 2)
    work(&job);
  else
    work_on_threads(&job, (size_t)num_threads < num_grains ? num_threads : (int)num_grains);
}
