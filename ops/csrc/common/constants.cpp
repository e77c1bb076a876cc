#include <ATen/core/Dict.h>
#include <ATen/core/List.h>
#include <torch/library.h>

#include "common/constants.h"
#include "common/routes.h"

namespace mmvmamba {
namespace {

// For each scan mode which routes, as bits, run along columns, and which in reverse.
Constants routes() {
  Constants result;
  for (const ScanMode& mode : kScanModes) {
    result["routes.column"].push_back(mode.routes.column);
    result["routes.reverse"].push_back(mode.routes.reverse);
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
