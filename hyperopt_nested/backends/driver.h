// Steps all tensors: sweep by sweep, block by block, in parallel; what is done for each sweep is put in.
extern "C" void run(int64_t count, void* const* inputs, const int64_t* rows, const int64_t* columns, int threads) {
  struct Block { int64_t tensor, first, rows, columns; };
  Array<Block> by_row, flat;
  Array<Numbers> numbers;
  numbers.resize(count);
  int64_t elements = 0;
  for (int64_t t = 0; t < count; t++) elements += rows[t] * columns[t];
  const bool past = elements * WIDTH > CACHE;
  for (int64_t begin = 0, end; begin < count; begin = end) {  // batches that the cache holds from sweep to sweep, if a tensor does
    by_row.resize(0);
    flat.resize(0);
    int64_t size = 0;
    for (end = begin; end < count && (end == begin || size + rows[end] * columns[end] <= BATCH); end++) {
      size += rows[end] * columns[end];
      int64_t step = larger(1, BLOCK / larger(columns[end], 1)), all = rows[end] * columns[end];
      for (int64_t row = 0; row < rows[end]; row += step)
        by_row.add({end, row, smaller(step, rows[end] - row), columns[end]});
      for (int64_t at = 0; at < all; at += BLOCK) flat.add({end, at, 1, smaller(BLOCK, all - at)});
    }
    int team = smaller(threads, larger(1, size / 32768));
@SWEEPS@
  }
}
