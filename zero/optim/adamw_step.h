/* The AdamW step, in the vector operations of adamw_isa.h. Included once for each ISA_LEVEL. */
#include "adamw_isa.h"

TARGET ALWAYS_INLINE VEC NAME(load_grad)(const void *grad, size_t i, int dtype) {
  if (dtype == DTYPE_FP32) return NAME(load_fp32)((const float *)grad + i);
  if (dtype == DTYPE_BF16) return NAME(load_bf16)((const uint16_t *)grad + i);
  return NAME(load_fp16)((const uint16_t *)grad + i);
}

/* LANES elements from index i on. The dtypes and `stream` are constants wherever speed matters. */
TARGET ALWAYS_INLINE void NAME(step)(const struct adamw_call *c, size_t i, int grad_dtype, int out_dtype, int stream) {
  const struct adamw_scalars *s = &c->scalars;
  VEC param = MUL(NAME(load_fp32)(c->master + i), SET1(s->decay));
  VEC grad = MUL(NAME(load_grad)(c->grad, i, grad_dtype), SET1(s->grad_scale));
  if (s->l2 != 0.0f) grad = FMA(SET1(s->l2), param, grad); /* not always: 0 * inf would be NaN */

  VEC exp_avg = NAME(load_fp32)(c->exp_avg + i);
  VEC change = SUB(grad, exp_avg);
  /* torch.lerp starts from the nearer end. */
  if (s->mean_weight < 0.5f)
    exp_avg = FMA(SET1(s->mean_weight), change, exp_avg);
  else
    exp_avg = FMA(SET1(s->mean_weight - 1.0f), change, grad);
  VEC exp_avg_sq = MUL(NAME(load_fp32)(c->exp_avg_sq + i), SET1(s->beta2));
  exp_avg_sq = FMA(MUL(SET1(s->square_weight), grad), grad, exp_avg_sq);
  /* The divide unit keeps up with memory, so there is nothing to gain from approximate inverses. */
  VEC denominator = ADD(DIV(SQRT(exp_avg_sq), SET1(s->bias2_root)), SET1(s->eps));
  param = ADD(param, DIV(MUL(SET1(s->neg_step), exp_avg), denominator));

  NAME(store_fp32)(c->exp_avg + i, exp_avg);
  NAME(store_fp32)(c->exp_avg_sq + i, exp_avg_sq);
  NAME(store_fp32)(c->master + i, param);
  if (out_dtype != DTYPE_NONE) NAME(store_16bit)((uint16_t *)c->out + i, param, out_dtype, stream);
}

#if LANES > 1

/* Fewer than LANES elements, through padded copies, so that they see the very same arithmetic. */
TARGET static void NAME(partial)(const struct adamw_call *c, size_t begin, size_t numel) {
  float master[LANES] = {0}, exp_avg[LANES] = {0}, exp_avg_sq[LANES] = {0}, grad[LANES] = {0};
  uint16_t out[LANES];
  size_t grad_bytes = c->grad_dtype == DTYPE_FP32 ? 4 : 2;
  struct adamw_call copy = *c;
  copy.master = master, copy.exp_avg = exp_avg, copy.exp_avg_sq = exp_avg_sq, copy.grad = grad, copy.out = out;
  memcpy(master, c->master + begin, numel * 4);
  memcpy(exp_avg, c->exp_avg + begin, numel * 4);
  memcpy(exp_avg_sq, c->exp_avg_sq + begin, numel * 4);
  memcpy(grad, (const char *)c->grad + begin * grad_bytes, numel * grad_bytes);
  NAME(step)(&copy, 0, c->grad_dtype, c->out_dtype, 0);
  memcpy(c->master + begin, master, numel * 4);
  memcpy(c->exp_avg + begin, exp_avg, numel * 4);
  memcpy(c->exp_avg_sq + begin, exp_avg_sq, numel * 4);
  if (c->out_dtype != DTYPE_NONE) memcpy((uint16_t *)c->out + begin, out, numel * 2);
}

/* The hardware prefetchers stop at each 4 KiB page, and four streams cross pages at once here: worth 15 % of the rate. */
TARGET ALWAYS_INLINE void NAME(prefetch)(const struct adamw_call *c, size_t i, int grad_dtype) {
  const char *grad = (const char *)c->grad + i * (grad_dtype == DTYPE_FP32 ? 4 : 2) + PREFETCH_BYTES;
  for (size_t line = 0; line < BLOCK_NUMEL * 4; line += 64) {
    __builtin_prefetch((const char *)(c->master + i) + PREFETCH_BYTES + line);
    __builtin_prefetch((const char *)(c->exp_avg + i) + PREFETCH_BYTES + line);
    __builtin_prefetch((const char *)(c->exp_avg_sq + i) + PREFETCH_BYTES + line);
    if (grad_dtype == DTYPE_FP32 || line == 0) __builtin_prefetch(grad + line);
  }
}

TARGET ALWAYS_INLINE void NAME(span)(const struct adamw_call *shared, size_t begin, size_t end, int grad_dtype,
                                     int out_dtype, int stream) {
  const struct adamw_call c = *shared; /* a copy of our own, which no store can change */
  size_t i = begin;
  for (; i + BLOCK_NUMEL <= end; i += BLOCK_NUMEL) {
    NAME(prefetch)(&c, i, grad_dtype);
    for (size_t lane = 0; lane < BLOCK_NUMEL; lane += LANES) NAME(step)(&c, i + lane, grad_dtype, out_dtype, stream);
  }
  for (; i < end; i += LANES) NAME(partial)(&c, i, end - i < LANES ? end - i : LANES);
  if (stream) _mm_sfence(); /* streaming stores are not ordered by themselves */
}

#else

ALWAYS_INLINE void NAME(span)(const struct adamw_call *shared, size_t begin, size_t end, int grad_dtype, int out_dtype,
                              int stream) {
  const struct adamw_call c = *shared;
  for (size_t i = begin; i < end; i++) NAME(step)(&c, i, grad_dtype, out_dtype, stream);
}

#endif

/* A loop of its own for each pair of dtypes. */
#define SPAN(grad_dtype, out_dtype)                            \
  case (grad_dtype) * 4 + (out_dtype):                         \
    if (CAN_STREAM && stream)                                  \
      NAME(span)(c, begin, end, grad_dtype, out_dtype, 1);     \
    else                                                       \
      NAME(span)(c, begin, end, grad_dtype, out_dtype, 0);     \
    break;

TARGET static void NAME(update)(const struct adamw_call *c, size_t begin, size_t end, int stream) {
  switch (c->grad_dtype * 4 + c->out_dtype) {
    SPAN(DTYPE_FP32, DTYPE_NONE)
    SPAN(DTYPE_FP32, DTYPE_BF16)
    SPAN(DTYPE_FP32, DTYPE_FP16)
    SPAN(DTYPE_BF16, DTYPE_NONE)
    SPAN(DTYPE_BF16, DTYPE_BF16)
    SPAN(DTYPE_BF16, DTYPE_FP16)
    SPAN(DTYPE_FP16, DTYPE_NONE)
    SPAN(DTYPE_FP16, DTYPE_BF16)
    SPAN(DTYPE_FP16, DTYPE_FP16)
  }
}
#undef SPAN
