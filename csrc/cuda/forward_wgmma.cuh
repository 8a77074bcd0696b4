// Statistics for sm_90a. While the products of one tile are under way, the exponentials of the tile before are computed.
//
// ptxas lets products run beside other work only where no branch stands between, and where none are under way across the back edge of a
// loop. So tiles whose pairs are all negative (plain ones) are visited first, with two sums in turn; the others after them, one at a time.
#pragma once

#include "accumulate.cuh"
#include "wgmma_walk.cuh"

namespace fastnce::cuda {

// Calls eat(n, products, plain) for every tile. For a plain one it returns a number to which all of its exponentials contribute: see
// wgmma_hold. ready(n) waits for the vectors that eat(n) reads. It is called before the products that run beside eat(n) are issued.
template <class W, class Ready, class Eat>
FASTNCE_DEVICE void consume(const W& walk, const Ready& ready, const Eat& eat) {
  const int warp = thread_index() / 32, count = walk.order().count, plain = walk.order().plain;
  if (count == 0) return;
  const char* x = walk.x() + warpgroup_row(warp) * GROUP_BYTES;
  barrier_wait(walk.x_full(), 0);
  const auto issue = [&](Strip<W::NB>& c, int n) {
    walk.tiles().wait_full(n);
    wgmma_fence();
    issue_logits<W::BN, W::DEPTH>(c, x, W::BM, walk.y(n));
    wgmma_commit();
  };
  const auto done = [&](Strip<W::NB>& c, int n) {
    wgmma_wait<0>();
    settle<W::NB>(c);
    walk.tiles().release(n);
  };
  Strip<W::NB> even, odd;
  // With ids no tile is known to be plain.
  if (!W::CONTENT && plain > 0) {
    issue(even, 0);
    done(even, 0);
    int n = 0;
    for (; n + 2 < plain; n += 2) {
      ready(n);
      issue(odd, n + 1);
      wgmma_hold(eat(n, even, std::true_type{}));
      done(odd, n + 1);
      ready(n + 1);
      issue(even, n + 2);
      wgmma_hold(eat(n + 1, odd, std::true_type{}));
      done(even, n + 2);
    }
    ready(n);
    if (n + 1 < plain) {
      issue(odd, n + 1);
      wgmma_hold(eat(n, even, std::true_type{}));
      done(odd, n + 1);
      ready(n + 1);
      eat(n + 1, odd, std::true_type{});
    } else {
      eat(n, even, std::true_type{});
    }
  }
  for (int n = plain; n < count; ++n) {
    ready(n);
    issue(even, n);
    done(even, n);
    eat(n, even, std::false_type{});
  }
}

template <class W>
FASTNCE_KERNEL(WGMMA_THREADS, 1)
wgmma_forward_rows(const __grid_constant__ TensorMap x_map, const __grid_constant__ TensorMap y_map, const Problem p, const Grid grid,
                   const RowSums out) {
  const Rules& r = p.rules;
  const int warp = thread_index() / 32, block = block_index() / grid.splits, split = block_index() % grid.splits, i0 = block * W::BM;
  Range steps = split_range(split, grid.per_split, ceil_div(r.columns, W::BN));
  if (*p.bound <= UNSHIFTED && !out.always) steps.end = steps.begin;
  const W walk{shared_memory()};
  // Rows from r.rows on are computed and not stored, so they need no mask.
  walk.start(r, steps, W::CONTENT, i0, false, 0);
  const auto column_of = [&](int n) { return walk.order().at(n) * W::BN; };
  if (warp < PRODUCER_WARPS) {
    give_registers<PRODUCER_REGISTERS>();
    if (warp == 0) walk.bring_tiles(&x_map, &y_map, i0, column_of);
    if (warp == 1) walk.bring_vectors(column_vectors<W::FIELDS>(p, nullptr), false, column_of);
    return;
  }
  take_registers<CONSUMER_REGISTERS>();
  const float largest = valid(p.scale) * LOG2E;
  const Rows rows = Rows::load(p, i0 + consumer_row(warp), 1.0f);
  RowAccumulator accumulator[2];
  consume(
      walk, [&](int n) { walk.vectors().wait_full(n); },
      [&](int n, Strip<W::NB>& c, auto plain) {
        const Columns<W::BN> columns = walk.columns(n);
        to_logits<W::NB, false>(c, rows, columns, largest);
        if constexpr (plain.value) {
#pragma unroll
          for (int h = 0; h < 2; ++h) accumulator[h].negative.template add_if<W::NB>(c, h, [](int) { return true; });
        } else {
          const Kinds kinds = classify<W::NB, W::CONTENT>(r, rows, column_of(n), columns);
#pragma unroll
          for (int h = 0; h < 2; ++h) accumulator[h].template add<W::NB>(c, h, kinds);
        }
        walk.vectors().release(n);
        return accumulator[0].negative.total + accumulator[1].negative.total;
      });
#pragma unroll
  for (int h = 0; h < 2; ++h) accumulator[h].template store<W::CONTENT>(r, grid, out, split, rows.i[h]);
}

template <class W>
FASTNCE_KERNEL(WGMMA_THREADS, 1)
wgmma_forward_both(const __grid_constant__ TensorMap x_map, const __grid_constant__ TensorMap y_map, const Problem p, const Grid grid,
                   const BothSums out) {
  static_assert(W::BM == W::BN);
  const Rules& r = p.rules;
  const int warp = thread_index() / 32, block = block_index() / grid.splits, split = block_index() % grid.splits, i0 = block * W::BM;
  const int across = ceil_div(r.columns, W::BN), first = block % across;
  const Range steps = split_range(split, grid.per_split, out.symmetric ? circle_steps(block, across) : across);
  if (!(*p.bound <= UNSHIFTED)) return;
  const W walk{shared_memory()};
  // A row from r.rows on would count in every column: with such rows all tiles are masked.
  walk.start(r, steps, W::CONTENT || i0 + W::BM > r.rows, i0, true, first);
  const auto column_of = [&](int n) { return circle_block(first, walk.order().at(n), across) * W::BN; };
  if (warp < PRODUCER_WARPS) {
    give_registers<PRODUCER_REGISTERS>();
    if (warp == 0) walk.bring_tiles(&x_map, &y_map, i0, column_of);
    if (warp == 1) walk.bring_vectors(column_vectors<W::FIELDS>(p, nullptr), false, column_of);
    for (int n = 0; warp > 1 && n < walk.order().count; ++n) {
      walk.sums().wait_full(n);
      // Where the keys are the queries, a tile on the diagonal holds its own mirror image: it adds to rows alone.
      const bool counts = !(out.symmetric && walk.order().at(n) == 0);
      for (int column = thread_index() - 64; column < W::BN; column += 64) {
        const int j = column_of(n) + column;
        if (counts && j < r.columns)
          add_column<W::CONTENT>(r, out, j, [&](int which) {
            float sum = 0.0f;
            for (int of = 0; of < CONSUMER_WARPS; ++of) sum += walk.sum(n, which, of, column);
            return sum;
          });
      }
      walk.sums().release(n);
    }
    return;
  }
  take_registers<CONSUMER_REGISTERS>();
  const Rows rows = Rows::load(p, i0 + consumer_row(warp), valid(p.scale) * LOG2E);
  BothAccumulator accumulator;
  consume(
      walk,
      [&](int n) {
        walk.vectors().wait_full(n);
        walk.sums().wait_empty(n);
      },
      [&](int n, Strip<W::NB>& c, auto plain) {
        const Columns<W::BN> columns = walk.columns(n);
        to_logits<W::NB, true>(c, rows, columns, 1.0f);
        const auto at = [&](int which, int column) -> float& { return walk.sum(n, which, warp - PRODUCER_WARPS, column); };
        if constexpr (plain.value) {
          float by_column[2 * W::NB] = {};
          accumulator.add<W::NB>(c, [](int, int) { return true; }, by_column);
          store_columns<W::NB>(by_column, [&](int column) -> float& { return at(0, column); });
        } else {
          // Half of the columns at a time: the kinds and sums of all of them do not fit into the registers.
          constexpr int HALF = W::NB / 2;
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            const int from = half * 8 * HALF;
            Strip<HALF>& t = reinterpret_cast<Strip<HALF>&>(c[half * HALF]);
            const Kinds kinds = classify<HALF, W::CONTENT>(r, rows, column_of(n) + from, Columns<W::BN>{columns.at + from});
            float sums[2 * HALF] = {};
            accumulator.add<HALF>(t, [&](int h, int k) { return has(kinds.negative[h], k); }, sums);
            store_columns<HALF>(sums, [&](int column) -> float& { return at(0, from + column); });
            if constexpr (W::CONTENT)
              accumulator.add_positives<HALF>(t, kinds, [&](int which, int column) -> float& { return at(which, from + column); });
          }
        }
        walk.vectors().release(n);
        walk.sums().fill(n);
        return accumulator.total[0] + accumulator.total[1];
      });
  accumulator.template store<W::CONTENT>(r, out, rows);
}

}  // namespace fastnce::cuda
