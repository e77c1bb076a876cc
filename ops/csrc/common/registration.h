// Defining the ops of a room from its schema.inc, the text that ops/registration.py reads too.
#pragma once

#include <torch/library.h>

#include <sstream>
#include <string>

namespace mmvmamba {

// `text` has a schema in each line that is not indented; indented lines go on with it.
inline void define_ops(torch::Library& library, const char* text) {
  library.set_python_module("mmvmamba.ops.registration");  // which has the fake kernels
  std::istringstream lines(text);
  std::string schema;
  const auto define = [&] {
    if (!schema.empty()) library.def(schema.c_str(), {at::Tag::pt2_compliant_tag});
    schema.clear();
  };
  for (std::string line; std::getline(lines, line);) {
    const size_t first = line.find_first_not_of(' ');
    if (first == 0) define();
    if (first != std::string::npos) schema += (first > 0 ? " " : "") + line.substr(first);
  }
  define();
}

}  // namespace mmvmamba
