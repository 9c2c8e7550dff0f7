// What x86.c and arm.c share: the loops over tokens and outputs. Each defines what it computes with before it includes
// this file: `largest`, `quantize`, `expand_panel`, `products`, `finish`, and CODE_OF_ZERO, what a stored code of x has
// less than the code itself.

// Codes of x: [tokens, in], `stride` values from a token to the next. scale: fp32 [tokens], found if `per_token`, else
// read; that of a token with a NaN becomes NaN. codes: [tokens, in]; interleaved [tokens, in rounded up to 32], whose
// codes beyond `in` are anything.
void fbqat_quantize(const void *x, int64_t stride, int64_t tokens, int64_t in, int dtype, int per_token, float *scale,
                    int zero_point, uint8_t *codes, int interleaved, int threads) {
  const size_t size = dtype == FLOAT32 ? 4 : 2;
  const int64_t padded = interleaved ? (in + STEP - 1) / STEP * STEP : in;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t m = 0; m < tokens; m++) {
    const void *token = (const char *)x + m * stride * size;
    if (per_token) {
      float most = largest(token, in, dtype);
      scale[m] = (most < 1e-8f ? 1e-8f : most) / 127.0f;
    }
    int nan = quantize(token, in, interleaved, dtype, scale[m], zero_point, codes + m * padded);
    if (nan) scale[m] = __builtin_nanf("");
  }
}

// y: [tokens, out] from the interleaved codes of fbqat_quantize, whose memory has room for tokens rounded up to 6.
// panels: `threads` times 2 * 16 * (in rounded up to 32) bytes to work in, 64-byte aligned. The rest is as
// packed_linear_reference has it.
void fbqat_multiply(const uint8_t *codes, int64_t tokens, int64_t in, const float *scale, int zero_point,
                    const uint8_t *weight, int64_t weight_stride, int64_t out, int wide, const float *weight_scale,
                    const float *bias, int8_t *panels, void *y, int dtype, int instructions, int threads) {
  const int64_t padded = (in + STEP - 1) / STEP * STEP;
  const int64_t rows = TILE_ROWS(instructions), columns = TILE_PANELS(instructions) * PANEL;
#pragma omp parallel num_threads(threads)
  {
    int8_t *low = panels + omp_get_thread_num() * 2 * PANEL * padded;
    int8_t *high = wide && HAS_DIGITS(instructions) ? low + PANEL * padded : NULL;
#pragma omp for schedule(dynamic)
    for (int64_t n = 0; n < out; n += columns) {
      const int64_t outputs = out - n < columns ? out - n : columns;
      int32_t shift[2 * PANEL];
      float scales[2 * PANEL] = {0}, biases[2 * PANEL] = {0};
      for (int64_t from = 0; from < columns; from += PANEL) {
        const int64_t left = outputs - from < PANEL ? outputs - from : PANEL;
        const uint8_t *first = weight + (n + from) * weight_stride;
        expand_panel(first, weight_stride, left, in, wide, low + from * padded, high, shift + from);
      }
      memcpy(scales, weight_scale + n, outputs * sizeof(float));
      if (bias) memcpy(biases, bias + n, outputs * sizeof(float));
      for (int64_t i = 0; i < columns; i++) shift[i] *= zero_point - CODE_OF_ZERO;
      for (int64_t m = 0; m < tokens; m += rows) {
        const int64_t some = tokens - m < rows ? tokens - m : rows;
        int32_t sums[12 * 2 * PANEL] __attribute__((aligned(64)));
        products(instructions, codes + m * padded, padded, low, high, padded, some, sums);
        for (int64_t r = 0; r < some; r++)
          for (int64_t c = 0; c < outputs; c += 8)
            finish(sums + r * columns + c, shift + c, scales + c, scale[m + r], bias ? biases + c : NULL, y,
                   (m + r) * out + n + c, outputs - c, dtype);
      }
    }
  }
}
