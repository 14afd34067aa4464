/* The optimizers' arithmetic on a block of fp32. Included once for each ISA_LEVEL.
 *
 * Every element goes through the operations of torch's single-tensor loop, in its order and with the fused multiply-adds
 * of torch's vector code. Hence the result of an element depends neither on its place in the array nor on the number of
 * threads, and AVX2 and AVX-512 agree to the bit.
 */


/* torch.lerp: it starts from the nearer end. */
TARGET ALWAYS_INLINE float NAME(lerp)(float from, float to, float weight) {
  return weight < 0.5f ? FMA(weight, to - from, from) : FMA(weight - 1.0f, to - from, to);
}

TARGET ALWAYS_INLINE void NAME(adam)(float *restrict p, float *restrict m, float *restrict v, const float *restrict g,
                                    const struct scalars *restrict scalars) {
  const struct scalars s = *scalars;
  for (size_t j = 0; j < STRIDE; j++) {
    float param = p[j] * s.decay;
    float grad = g[j] * s.grad_scale;
    grad = s.l2 != 0.0f ? FMA(s.l2, param, grad) : grad; /* not always: 0 * inf would be NaN */
    float mean = NAME(lerp)(m[j], grad, s.mean_weight);
    float square = FMA(s.square_weight * grad, grad, v[j] * s.decay2);
    /* The divide unit keeps up with memory, so there is nothing to gain from approximate inverses. */
    float denominator = sqrtf(square) / s.bias2_root + s.eps;
    p[j] = param + s.neg_step * mean / denominator;
    m[j] = mean;
    v[j] = square;
  }
}

TARGET ALWAYS_INLINE void NAME(sgd)(float *restrict p, float *restrict m, const float *restrict g,
                                    const struct scalars *restrict scalars, int has_momentum) {
  const struct scalars s = *scalars;
  for (size_t j = 0; j < STRIDE; j++) {
    float grad = g[j] * s.grad_scale;
    grad = s.l2 != 0.0f ? FMA(s.l2, p[j], grad) : grad;
    if (has_momentum) {
      float mean = s.first ? grad : FMA(s.mean_weight, grad, m[j] * s.decay2);
      grad = s.nesterov ? FMA(s.decay2, mean, grad) : mean;
      m[j] = mean;
    }
    p[j] = FMA(s.neg_step, grad, p[j]);
  }
}

TARGET ALWAYS_INLINE void NAME(lion)(float *restrict p, float *restrict m, const float *restrict g,
                                     const struct scalars *restrict scalars) {
  const struct scalars s = *scalars;
  for (size_t j = 0; j < STRIDE; j++) {
    float grad = g[j] * s.grad_scale;
    float way = NAME(lerp)(m[j], grad, s.mean_weight);
    float sign = (way > 0.0f ? 1.0f : 0.0f) - (way < 0.0f ? 1.0f : 0.0f);
    p[j] = FMA(s.neg_step, sign, p[j] * s.decay);
    m[j] = NAME(lerp)(m[j], grad, s.square_weight);
  }
}
