// What x86.c and arm.c share: their types, the loops over tokens and outputs, and the functions that each defines for
// these loops. Before it includes this file each says what `eight` is, 8 values as float, and CODE_OF_ZERO, what its
// stored codes of x have less than the codes themselves.

#include <omp.h>
#include <stdint.h>
#include <string.h>

enum { FLOAT32, BFLOAT16, FLOAT16 };  // x and y
enum { PANEL = 16, STEP = 32 };       // outputs, and inputs, that are expanded together
enum { MOST_ROWS = 12 };              // tokens of a tile of y

// The order of each 8 codes of x that the product reads: that in which the nibbles of 4 bytes come out, low ones first
static const uint8_t INTERLEAVED[16] = {0, 2, 4, 6, 1, 3, 5, 7, 8, 10, 12, 14, 9, 11, 13, 15};
// of a nibble
static const int8_t CODES[16] = {0, 1, 2, 3, 4, 5, 6, 7, -8, -7, -6, -5, -4, -3, -2, -1};

// Values i to i + 7.
static inline eight load8(const void *x, int64_t i, int dtype);
static inline void store8(void *y, int64_t i, int dtype, eight v);
// The largest magnitude of a token; NaN if it has one.
static float largest(const void *x, int64_t n, int dtype);
// round(x / scale) + zero_point, held in 0..255, less CODE_OF_ZERO: n codes, interleaved n rounded up to 8. Gives
// whether x has a NaN, for which there is no code.
static int quantize(const void *x, int64_t n, int interleaved, int dtype, float scale, int zero_point, uint8_t *codes);
// Tokens and panels of a tile of y, and whether codes of more than 4 bits are two digits.
static inline int64_t tile_rows(int instructions);
static inline int64_t tile_panels(int instructions);
static inline int has_digits(int instructions);
// Up to 16 outputs into a panel: 4 inputs of each, then the next 4, in the order of x's codes. Of codes of more than 4
// bits (`wide`) there are two panels of digits if `high` is given. sums: of each output's codes.
static void expand_panel(const uint8_t *weight, int64_t stride, int64_t outputs, int64_t n, int wide, int8_t *low,
                         int8_t *high, int32_t *sums);
// int32 sums of a tile: of `rows` tokens' codes, `stride` apart, with panels. `high`: of second digits, or NULL.
static void products(int instructions, const uint8_t *a, int64_t stride, const int8_t *low, const int8_t *high,
                     int64_t padded, int64_t rows, int32_t *sums);
// (sums - shift) * scales, of 8 outputs of a token.
static inline eight scaled(const int32_t *sums, const int32_t *shift, const float *scales);
// v * scale, + biases if there are any.
static inline eight finished(eight v, float scale, const float *biases);
static inline eight added(eight a, eight b);

// up to 8 values, the others 0
static inline eight load_some(const void *x, int64_t i, int64_t n, int dtype) {
  if (n >= 8) return load8(x, i, dtype);
  char buffer[32] = {0};
  size_t size = dtype == FLOAT32 ? 4 : 2;
  memcpy(buffer, (const char *)x + i * size, n * size);
  return load8(buffer, 0, dtype);
}

static inline void store_some(void *y, int64_t i, int64_t n, int dtype, eight v) {
  if (n >= 8) {
    store8(y, i, dtype, v);
    return;
  }
  char buffer[32];
  size_t size = dtype == FLOAT32 ? 4 : 2;
  store8(buffer, 0, dtype, v);
  memcpy((char *)y + i * size, buffer, n * size);
}

// 16 bytes of a row of `size`, from byte `from`; 0 beyond its end. Of an odd row of nibbles the last is left out.
static inline const uint8_t *sixteen(const uint8_t *row, int64_t from, int64_t size, int odd, uint8_t *buffer) {
  if (size - from >= 16 + odd) return row + from;
  memset(buffer, 0, 16);
  if (size > from) memcpy(buffer, row + from, size - from < 16 ? size - from : 16);
  if (odd && size > from && size - from <= 16) buffer[size - from - 1] &= 15;
  return buffer;
}

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

// Weights of `columns` outputs, of which `outputs` are there, in groups of `size` inputs that share a scale.
typedef struct {
  int64_t outputs, columns, groups, size;
  int8_t *low, *high;  // [groups, columns, size], as expand_panel makes them
  int32_t *shift;      // [groups, columns]: the sum of the codes, times the zero of x's codes
  float *scales;       // [groups, columns]
} part;

static void expand(const part *to, const uint8_t *weight, int64_t stride, int64_t in, int wide, const float *scales,
                   int zero) {
  const int64_t length = to->groups == 1 ? in : to->size;
  for (int64_t g = 0; g < to->groups; g++) {
    const int64_t at = g * to->columns, from = wide ? g * to->size : g * to->size / 2;
    for (int64_t n = 0; n < to->columns; n += PANEL) {
      const int64_t left = to->outputs - n < PANEL ? to->outputs - n : PANEL, panel = (at + n) * to->size;
      expand_panel(weight + n * stride + from, stride, left, length, wide, to->low + panel,
                   to->high ? to->high + panel : NULL, to->shift + at + n);
    }
    for (int64_t n = 0; n < to->columns; n++) {
      to->shift[at + n] *= zero;
      to->scales[at + n] = n < to->outputs ? scales[n * to->groups + g] : 0;
    }
  }
}

// What y is made of, beside the weights: as fbqat_multiply has them.
typedef struct {
  const uint8_t *codes;
  int64_t tokens, padded, out;
  const float *scale;
  void *y;
  int dtype, instructions;
} input;

// Columns n and on of y. groups: those of p, a number that the compiler knows where there is one.
static inline __attribute__((always_inline)) void multiply(const input *x, const part *p, const float *biases,
                                                           int64_t n, const int64_t groups) {
  const int64_t rows = tile_rows(x->instructions);
  for (int64_t m = 0; m < x->tokens; m += rows) {
    const int64_t some = x->tokens - m < rows ? x->tokens - m : rows;
    int32_t sums[MOST_ROWS * 2 * PANEL] __attribute__((aligned(64)));
    float so_far[MOST_ROWS * 2 * PANEL];
    for (int64_t g = 0; g < groups; g++) {
      const int64_t at = g * p->columns, panel = at * p->size;
      products(x->instructions, x->codes + m * x->padded + g * p->size, x->padded, p->low + panel,
               p->high ? p->high + panel : NULL, p->size, some, sums);
      for (int64_t r = 0; r < some; r++)
        for (int64_t c = 0; c < p->outputs; c += 8) {
          eight v = scaled(sums + r * p->columns + c, p->shift + at + c, p->scales + at + c);
          if (g > 0) v = added(v, load8(so_far, r * p->columns + c, FLOAT32));
          if (g < groups - 1) {
            store8(so_far, r * p->columns + c, FLOAT32, v);
            continue;
          }
          v = finished(v, x->scale[m + r], biases ? biases + c : NULL);
          store_some(x->y, (m + r) * x->out + n + c, p->outputs - c, x->dtype, v);
        }
    }
  }
}

// y: [tokens, out] from the interleaved codes of fbqat_quantize, whose memory has room for tokens rounded up to 6.
// weight_scale: [out, groups]; where there are several groups, each has a multiple of 32 inputs. work: `threads` times
// 2 * 16 * (in rounded up to 32 + 8 * groups) bytes, 64-byte aligned. The rest is as packed_linear_reference has it.
void fbqat_multiply(const uint8_t *codes, int64_t tokens, int64_t in, const float *scale, int zero_point,
                    const uint8_t *weight, int64_t weight_stride, int64_t out, int wide, const float *weight_scale,
                    int64_t groups, const float *bias, int8_t *work, void *y, int dtype, int instructions,
                    int threads) {
  const int64_t padded = (in + STEP - 1) / STEP * STEP, columns = tile_panels(instructions) * PANEL;
  const input x = {codes, tokens, padded, out, scale, y, dtype, instructions};
#pragma omp parallel num_threads(threads)
  {
    part p = {.columns = columns, .groups = groups, .size = padded / groups};
    p.low = work + omp_get_thread_num() * 2 * PANEL * (padded + 8 * groups);
    p.high = wide && has_digits(instructions) ? p.low + columns * padded : NULL;
    p.shift = (int32_t *)(p.low + 2 * PANEL * padded);
    p.scales = (float *)(p.shift + 2 * PANEL * groups);
#pragma omp for schedule(dynamic)
    for (int64_t n = 0; n < out; n += columns) {
      p.outputs = out - n < columns ? out - n : columns;
      expand(&p, weight + n * weight_stride, weight_stride, in, wide, weight_scale + n * groups,
             zero_point - CODE_OF_ZERO);
      float biases[2 * PANEL] = {0};
      if (bias) memcpy(biases, bias + n, p.outputs * sizeof(float));
      if (groups == 1)
        multiply(&x, &p, bias ? biases : NULL, n, 1);
      else
        multiply(&x, &p, bias ? biases : NULL, n, groups);
    }
  }
}
