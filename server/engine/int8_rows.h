/* int8_rows.c includes this once for each type that activations may have: NUMBER; WIDEN makes a float of it and NARROW
 * makes it of a float; NAMED(f) is f's name for the type.
 */
void NAMED(antefix_round)(
    const NUMBER *x, int64_t rows, int64_t size, uint8_t *rounded, float *scales, int64_t threads) {
#pragma omp parallel for schedule(static) num_threads(threads) if (rows * size > WORTH_THREADS)
  for (int64_t row = 0; row < rows; row++) {
    const NUMBER *from = x + row * size;
    uint8_t *to = rounded + row * size;
    uint32_t most = 0; /* without their signs, floats are in the order of their bits, and NaN comes after infinity */
    for (int64_t i = 0; i < size; i++) {
      const uint32_t bits = (Bits){.f = WIDEN(from[i])}.i & ~SIGN;
      most = bits > most ? bits : most;
    }
    const float scale = (Bits){.i = most}.f / LARGEST;
    const float by = scale >= SMALLEST ? 1 / scale : 0;
    scales[row] = most < INFINITE ? scale : NAN;
    for (int64_t i = 0; i < size; i++) to[i] = (uint8_t)((int32_t)rintf(WIDEN(from[i]) * by) + ZERO_POINT);
  }
}

/* y = products * the row's scale + bias */
void NAMED(antefix_scale)(
    const float *products, const float *scales, const float *bias, int64_t rows, int64_t size, NUMBER *y,
    int64_t threads) {
#pragma omp parallel for schedule(static) num_threads(threads) if (rows * size > WORTH_THREADS)
  for (int64_t row = 0; row < rows; row++)
    for (int64_t i = 0; i < size; i++)
      y[row * size + i] = NARROW(products[row * size + i] * scales[row] + bias[i]);
}
