// Reads one layer and its input from standard input, computes it with arm.c, and writes the output: for test_arm.py.
#include <stdio.h>
#include <stdlib.h>

#include "arm.c"

static void *read_all(size_t size) {
  void *memory = aligned_alloc(64, (size + 64) / 64 * 64);
  if (fread(memory, 1, size, stdin) != size) exit(1);
  return memory;
}

int main(void) {
  int64_t *of = read_all(9 * 8);  // tokens, in, out, dtype, per_token, zero_point, wide, groups, has a bias
  const int64_t tokens = of[0], in = of[1], out = of[2], padded = (in + STEP - 1) / STEP * STEP;
  const size_t size = of[3] == FLOAT32 ? 4 : 2, width = of[6] ? in : (in + 1) / 2;
  void *x = read_all(tokens * in * size);
  float *scale = read_all(4 * tokens);
  uint8_t *weight = read_all(out * width);
  float *weight_scale = read_all(4 * out * of[7]), *bias = of[8] ? read_all(4 * out) : NULL;
  uint8_t *codes = aligned_alloc(64, (tokens + 6) * padded);
  int8_t *work = aligned_alloc(64, 2 * 2 * PANEL * (padded + 8 * of[7]));
  void *y = malloc(tokens * out * size);
  fbqat_quantize(x, in, tokens, in, of[3], of[4], scale, of[5], codes, 1, 2);
  fbqat_multiply(codes, tokens, in, scale, of[5], weight, width, out, of[6], weight_scale, of[7], bias, work, y, of[3],
                 0, 2);
  return fwrite(y, size, tokens * out, stdout) != (size_t)(tokens * out);
}
