#include "common/constants.h"

#include <ATen/core/Dict.h>
#include <ATen/core/List.h>
#include <torch/library.h>

#include <cstdlib>

#include "common/routes.h"

namespace mmvmamba {
namespace {

// For each scan mode which routes, as bits, run along columns, and which in reverse: seen on a map of 2 x 3.
Constants routes() {
  Constants result;
  auto &column = result["routes.column"], &reverse = result["routes.reverse"];
  for (int64_t mode = 0; mode < 4; ++mode) {
    int64_t columns = 0, reversed = 0;
    for (int64_t k = 0; k < kRoutes; ++k) {
      const int64_t first = route_pixel(mode, k, 0, 2, 3), second = route_pixel(mode, k, 1, 2, 3);
      columns |= int64_t{std::abs(second - first) != 1} << k;
      reversed |= int64_t{first != 0} << k;
    }
    column.push_back(columns), reverse.push_back(reversed);
  }
  return result;
}

const AddConstants add_routes(routes());

c10::Dict<std::string, c10::List<int64_t>> as_dict() {
  c10::Dict<std::string, c10::List<int64_t>> result;
  for (const auto& [name, values] : constants()) result.insert(name, c10::List<int64_t>(values));
  return result;
}

}  // namespace

Constants& constants() {
  static Constants all;
  return all;
}

}  // namespace mmvmamba

TORCH_LIBRARY_FRAGMENT(mmvmamba, m) { m.def("constants() -> Dict(str, int[])", &mmvmamba::as_dict); }
