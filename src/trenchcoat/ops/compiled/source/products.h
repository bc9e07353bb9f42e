// Products of small matrices that lie in the caches, of blocks of ROWS x (2 vectors) that stay in registers.
#pragma once
#include "vectors.h"

constexpr Int ROWS = 6, COLUMNS = 2 * LANES;

// Columns up to a multiple of a block.
static inline Int whole(Int columns) { return (columns + COLUMNS - 1) / COLUMNS * COLUMNS; }

// A row's length in memory: not a multiple of a large power of two, which would put all rows into the same cache sets.
static inline Int spaced(Int columns) { return (whole(columns) / 16 % 2 ? 0 : 16) + whole(columns); }

// Element (m, k) is at data[m * row + k * column].
struct Left {
  const float *data;
  Int row, column;
};

// What a triangular mask leaves of a product; `lead` keys come before the first query, and key lead + i is that of query i.
enum Part {
  ALL,
  QUERIES_FROM,  // rows are keys, columns queries: a key has no query before it
  KEYS_UPTO,     // rows are queries, sums run over keys: a query has no key after it
  QUERIES_SUM,   // rows are keys, sums run over queries
};

template <int M>
static inline __attribute__((always_inline)) void block(Left a, const float *b, Int b_row, float *c, Int c_row, Int depth,
                                                        bool add) {
  Vec s[M][2];
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m)
    for (int v = 0; v < 2; ++v) s[m][v] = add ? load(c + m * c_row + v * LANES) : Vec{};
  const float *p = a.data;
  for (Int k = 0; k < depth; ++k, p += a.column, b += b_row) {
    Vec b0 = load(b), b1 = load(b + LANES);
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) {
      Vec x = splat(p[m * a.row]);
      s[m][0] += x * b0;
      s[m][1] += x * b1;
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m)
    for (int v = 0; v < 2; ++v) store(c + m * c_row + v * LANES, s[m][v]);
}

static inline void blocks(Int rows, Left a, const float *b, Int b_row, float *c, Int c_row, Int depth, bool add) {
  switch (rows) {
    case 1: return block<1>(a, b, b_row, c, c_row, depth, add);
    case 2: return block<2>(a, b, b_row, c, c_row, depth, add);
    case 3: return block<3>(a, b, b_row, c, c_row, depth, add);
    case 4: return block<4>(a, b, b_row, c, c_row, depth, add);
    case 5: return block<5>(a, b, b_row, c, c_row, depth, add);
    default: return block<6>(a, b, b_row, c, c_row, depth, add);
  }
}

// c [rows, columns] (+)= a [rows, depth] b [depth, columns]; columns are computed in whole blocks, so rows of b and c must
// be that long. Blocks that `part` leaves out keep their content.
template <Part part>
static void product(Left a, const float *b, Int b_row, float *c, Int c_row, Int rows, Int columns, Int depth, bool add,
                    Int lead = 0) {
  for (Int n = 0; n < columns; n += COLUMNS)
    for (Int m = 0; m < rows; m += ROWS) {
      Int height = rows - m < ROWS ? rows - m : ROWS, from = 0, upto = depth;
      if (part == QUERIES_FROM && n + COLUMNS <= m - lead) break;
      if (part == KEYS_UPTO && lead + m + height < depth) upto = lead + m + height;
      if (part == QUERIES_SUM && m > lead) from = m - lead < depth ? m - lead : depth;
      Left left = {a.data + m * a.row + from * a.column, a.row, a.column};
      blocks(height, left, b + from * b_row + n, b_row, c + m * c_row + n, c_row, upto - from, add);
    }
}
