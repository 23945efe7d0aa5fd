// Included once by each for_*.cc, after it has defined
//   NAMESPACE, LANES, TARGET (a function attribute), OPERATIONS (the header of its operations).

#include <cstdint>
#include <cstring>
#include <utility>

#include "kernels.h"

#define INLINE TARGET __attribute__((always_inline)) inline

namespace jaxquant {
namespace NAMESPACE {
#include "vectors.h"
#include OPERATIONS
#include "forms.h"
#include "product.h"
#include "decode.h"
#include "lattice.h"
#include "tiles.h"
#include "attend.h"
#include "float_tile.h"

extern const Kernels kernels = {
    NAME,
    LANES,
    {BY_ROWS(multiply_integers, Whole<Integer<2>>),
     BY_ROWS(multiply_integers, Whole<Integer3>),
     BY_ROWS(multiply_integers, Whole<Integer<4>>),
     {nullptr, multiply_bytes<2, 4>, multiply_bytes<2, 2>, multiply_bytes<4, 1>},
     BY_ROWS_TABLED(Tabled<Integer<2>>),
     BY_ROWS_TABLED(Tabled<Integer3>),
     BY_ROWS_TABLED(Tabled<Integer<4>>),
     {},
     TILES(Ints, int32_t),
     {nullptr, nullptr, nullptr, multiply_integers<Lattice<true>, 2, 1>}},
    {BY_ROWS(multiply_floats, Whole<Integer<2>>),
     BY_ROWS(multiply_floats, Whole<Integer3>),
     BY_ROWS(multiply_floats, Whole<Integer<4>>),
     BY_ROWS(multiply_floats, Whole<Integer<8>>),
     BY_ROWS(multiply_floats, Tabled<Integer<2>>),
     BY_ROWS(multiply_floats, Tabled<Integer3>),
     BY_ROWS(multiply_floats, Tabled<Integer<4>>),
     {multiply_floats<Float32, 2, 6>, multiply_floats<Float32, 2, 4>,
      multiply_floats<Float32, 2, 2>, multiply_floats<Float32, 4, 1>},
     TILES(Floats, float),
     {nullptr, nullptr, nullptr, multiply_floats<Lattice<false>, 4, 1>}},
    {unpack<Whole<Integer<2>>>, unpack<Whole<Integer3>>, unpack<Whole<Integer<4>>>,
     unpack<Whole<Integer<8>>>, unpack<Tabled<Integer<2>>>, unpack<Tabled<Integer3>>,
     unpack<Tabled<Integer<4>>>},
    scaled,
    widen,
    quantize,
    zeros,
    trellis,
    lattice,
    scores,
    mix,
    by_channel,
    by_row,
    turn,
    exponentials,
    float_tile,
    nullptr,
};

}  // namespace NAMESPACE
}  // namespace jaxquant
