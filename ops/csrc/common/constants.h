// Numbers of the kernels that Python needs, by names such as selective_scan.cpu.chunk; torch.ops.mmvmamba.constants().
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <vector>

namespace mmvmamba {

using Constants = std::map<std::string, std::vector<int64_t>>;

// Those of all rooms; each adds its own when the library is loaded.
Constants& constants();

struct AddConstants {
  explicit AddConstants(const Constants& own) { constants().insert(own.begin(), own.end()); }
};

}  // namespace mmvmamba
