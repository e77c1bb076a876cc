#pragma once

namespace mmvmamba {
enum class Type { kHalf, kBfloat16, kFloat, kDouble };
}
