/* An update of a range of elements. Included once for each ISA_LEVEL. */
#include "kernel_isa.h"
#include "kernel_formats.h"
#include "kernel_rules.h"

/* Return STRIDE gradients in fp32, in `room` if they are not that already. */
TARGET ALWAYS_INLINE const float *NAME(widen_grad)(const struct call *c, size_t i, float *room) {
  if (c->grad_dtype == DTYPE_FP32) return (const float *)c->grad + i;
  NAME(widen)(room, (const uint16_t *)c->grad + i, c->grad_dtype);
  return room;
}

/* Which rule is a constant in each caller; which dtype is found out each time: a branch that is always foreseen. */
TARGET ALWAYS_INLINE void NAME(obey)(int rule, float *p, float *m, float *v, const float *g, const struct scalars *s) {
  if (rule == RULE_ADAM) NAME(adam)(p, m, v, g, s);
  if (rule == RULE_SGD || rule == RULE_MOMENTUM) NAME(sgd)(p, m, g, s, rule == RULE_MOMENTUM);
  if (rule == RULE_LION) NAME(lion)(p, m, g, s);
}

TARGET static void NAME(update)(const struct call *c, size_t begin, size_t end, int stream);

/* -- STRIDE elements from i on, by format ---------------------------------------------------------------------------*/

TARGET ALWAYS_INLINE void NAME(stride_fp32)(const struct call *c, size_t i, int rule, int stream) {
  float room[STRIDE];
  uint16_t half[STRIDE] __attribute__((aligned(64)));
  const float *g = NAME(widen_grad)(c, i, room);
  float *p = (float *)c->master + i;
  uint16_t *out = (uint16_t *)c->out + i;
  NAME(obey)(rule, p, (float *)c->first + i, (float *)c->second + i, g, &c->scalars);
  if (c->out_dtype == DTYPE_NONE) return;
  NAME(narrow)(stream ? half : out, p, c->out_dtype);
  if (stream) store_past_caches(out, half);
}

TARGET ALWAYS_INLINE void NAME(stride_split)(const struct call *c, size_t i) {
  float room[STRIDE], p[STRIDE], v[STRIDE];
  uint16_t *up = (uint16_t *)c->out + i;
  int16_t *low = (int16_t *)c->master + i;
  float *second = (float *)c->second + i;
  const float *g = NAME(widen_grad)(c, i, room);
  NAME(join_split)(p, v, up, low, second);
  NAME(adam)(p, (float *)c->first + i, v, g, &c->scalars);
  NAME(part_split)(up, low, second, p, v);
}

TARGET ALWAYS_INLINE void NAME(stride_bf16)(const struct call *c, size_t i) {
  float room[STRIDE], p[STRIDE], m[STRIDE], v[STRIDE];
  uint32_t noise[STRIDE];
  uint16_t *up = (uint16_t *)c->out + i, *first = (uint16_t *)c->first + i, *second = (uint16_t *)c->second + i;
  int16_t *low = (int16_t *)c->master + i;
  const float *g = NAME(widen_grad)(c, i, room);
  NAME(join_16)(p, up, low);
  NAME(widen)(m, first, DTYPE_BF16);
  NAME(widen)(v, second, DTYPE_BF16);
  NAME(adam)(p, m, v, g, &c->scalars);
  NAME(make_noise)(noise, c->noise_key, c->noise_index + i);
  NAME(part_16)(up, low, p);
  NAME(round_moments)(first, second, m, v, noise);
}

TARGET ALWAYS_INLINE void NAME(stride)(const struct call *c, size_t i, int rule, int format, int stream) {
  if (format == FORMAT_FP32) NAME(stride_fp32)(c, i, rule, stream);
  if (format == FORMAT_SPLIT) NAME(stride_split)(c, i);
  if (format == FORMAT_BF16) NAME(stride_bf16)(c, i);
}

/* Fewer than STRIDE elements, through padded copies, so that they see the very same arithmetic. */
TARGET static NOINLINE void NAME(rest)(const struct call *c, size_t i, size_t numel) {
  char room[NUM_ARRAYS][STRIDE * 4] __attribute__((aligned(64)));
  struct call copy = *c;
  memset(room, 0, sizeof room);
  exchange_arrays(c, &copy, room, i, numel, 0);
  copy.noise_index = c->noise_index + i;
  NAME(update)(&copy, 0, STRIDE, 0);
  exchange_arrays(c, &copy, room, i, numel, 1);
}

/* A loop of its own for each rule and format. */
TARGET ALWAYS_INLINE void NAME(span)(const struct call *shared, size_t begin, size_t end, int rule, int format,
                                     int stream) {
  const struct call c = *shared; /* a copy of our own, which no store can change */
  size_t i = begin;
  for (; i + STRIDE <= end; i += STRIDE) {
    fetch_ahead(&c, i, rule, format);
    NAME(stride)(&c, i, rule, format, stream);
  }
  if (i < end) NAME(rest)(&c, i, end - i);
}

/* -- the 8-bit format: whole blocks, as their elements share a scale ------------------------------------------------*/

/* Block `b`, of which elements [begin, end) are updated and the others put back, at most in another code; from `numel` on
 * there are none. */
TARGET static NOINLINE void NAME(block)(const struct call *c, size_t b, size_t begin, size_t end, size_t numel) {
  float grad[STRIDE], p[BLOCK], m[BLOCK], v[BLOCK], old[2][BLOCK];
  uint32_t noise[STRIDE], most[2];
  const size_t i = b * BLOCK;
  const int whole = begin == 0 && end == BLOCK;
  uint8_t *first = (uint8_t *)c->first + i, *second = (uint8_t *)c->second + i;
  for (size_t j = 0; j < BLOCK; j += STRIDE) {
    NAME(widen_codes)(m + j, v + j, first + j, second + j, c->first_scale[b], c->second_scale[b]);
    NAME(join_8)(p + j, (uint16_t *)c->out + i + j, (uint8_t *)c->master + i + j);
  }
  if (!whole) memcpy(old[0], m, sizeof m), memcpy(old[1], v, sizeof v);
  for (size_t j = 0; j < BLOCK; j += STRIDE)
    NAME(adam)(p + j, m + j, v + j, NAME(widen_grad)(c, i + j, grad), &c->scalars);
  if (!whole) put_back(m, old[0], begin, end), put_back(v, old[1], begin, end);
  /* Code 0 of a second moment is not zero: what is not there must not keep the scale up. */
  memset(m + numel, 0, (BLOCK - numel) * sizeof *m), memset(v + numel, 0, (BLOCK - numel) * sizeof *v);
  most[0] = NAME(greatest)(m), most[1] = NAME(greatest)(v);
  c->first_scale[b] = scale_for(most[0]), c->second_scale[b] = scale_for(most[1]);
  const float inverses[2] = {inverse_of(c->first_scale[b]), inverse_of(c->second_scale[b])};
  for (size_t j = 0; j < BLOCK; j += STRIDE) {
    NAME(make_noise)(noise, c->noise_key, c->noise_index + i + j);
    NAME(part_8)((uint16_t *)c->out + i + j, (uint8_t *)c->master + i + j, p + j, noise);
    NAME(narrow_to_codes)(first + j, second + j, m + j, v + j, inverses[0], inverses[1], noise);
  }
}

/* A block that is not updated as a whole, or that the end of the arrays cuts, through padded copies. */
TARGET static NOINLINE void NAME(part_of_block)(const struct call *c, size_t b, size_t begin, size_t end) {
  char room[NUM_ARRAYS][BLOCK * 4] __attribute__((aligned(64)));
  struct call copy = *c;
  const size_t i = b * BLOCK, numel = c->numel - i < BLOCK ? c->numel - i : BLOCK;
  memset(room, 0, sizeof room);
  exchange_arrays(c, &copy, room, i, numel, 0);
  copy.first_scale = c->first_scale + b, copy.second_scale = c->second_scale + b;
  copy.noise_index = c->noise_index + i;
  NAME(block)(&copy, 0, begin, end, numel);
  /* Weights are no matter of the block: what is outside stays as it is, to the bit. */
  exchange_weights(c, &copy, i, begin, end);
}

TARGET static void NAME(blocks)(const struct call *shared, size_t begin, size_t end) {
  const struct call c = *shared;
  while (begin < end) {
    size_t b = begin / BLOCK, start = begin % BLOCK, stop = end - b * BLOCK < BLOCK ? end - b * BLOCK : BLOCK;
    if (stop - start == BLOCK) {
      for (size_t j = 0; j < BLOCK; j += STRIDE) fetch_ahead(&c, begin + j, RULE_ADAM, FORMAT_8BIT);
      NAME(block)(&c, b, 0, BLOCK, BLOCK);
    } else
      NAME(part_of_block)(&c, b, start, stop);
    begin = b * BLOCK + stop;
  }
}

TARGET static void NAME(update)(const struct call *c, size_t begin, size_t end, int stream) {
  if (c->format == FORMAT_8BIT) return NAME(blocks)(c, begin, end);
  if (c->format == FORMAT_SPLIT) return NAME(span)(c, begin, end, RULE_ADAM, FORMAT_SPLIT, 0);
  if (c->format == FORMAT_BF16) return NAME(span)(c, begin, end, RULE_ADAM, FORMAT_BF16, 0);
  switch (c->rule) {
    case RULE_SGD: return NAME(span)(c, begin, end, RULE_SGD, FORMAT_FP32, 0);
    case RULE_MOMENTUM: return NAME(span)(c, begin, end, RULE_MOMENTUM, FORMAT_FP32, 0);
    case RULE_LION: return NAME(span)(c, begin, end, RULE_LION, FORMAT_FP32, 0);
  }
  if (!stream) return NAME(span)(c, begin, end, RULE_ADAM, FORMAT_FP32, 0);
  NAME(span)(c, begin, end, RULE_ADAM, FORMAT_FP32, 1);
  end_of_stores();
}
