// Runs a package of tools/export/to_package.py without Python: images in, the model's outputs out.
//
//   run_package MODEL.pt2 OPS.so IMAGES OUTPUTS BATCH CHANNELS HEIGHT WIDTH
//
// IMAGES holds normalised float32 values in the order (batch, channel, row, column); the values of all outputs go to
// OUTPUTS, their shapes to the terminal. OPS.so is the library that mmvmamba.export.op_library() names.
#include <ATen/ATen.h>
#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>

#include <exception>
#include <fstream>
#include <iostream>
#include <sstream>
#include <stdexcept>
#include <string>
#include <unordered_map>
#include <vector>

namespace {

// The ops register themselves with libtorch when their library is opened.
void load_ops(const std::string& path) {
  if (dlopen(path.c_str(), RTLD_NOW | RTLD_GLOBAL) == nullptr) throw std::runtime_error(dlerror());
}

at::Tensor read_images(const std::string& path, const std::vector<int64_t>& shape) {
  at::Tensor images = at::empty(shape, at::kFloat);
  std::ifstream file(path, std::ios::binary);
  if (!file.read(static_cast<char*>(images.data_ptr()), static_cast<std::streamsize>(images.nbytes()))) {
    throw std::runtime_error(path + " has fewer values than BATCH CHANNELS HEIGHT WIDTH ask for");
  }
  return images;
}

// The machine code takes images of any shape for right, and would read past them.
void check_shape(const std::vector<int64_t>& shape, std::unordered_map<std::string, std::string> metadata) {
  const char* names[] = {"BATCH", "CHANNELS", "HEIGHT", "WIDTH"};
  std::istringstream all_least(metadata["mmvmamba.least"]), all_most(metadata["mmvmamba.most"]);
  for (size_t i = 0; i < shape.size(); ++i) {
    int64_t least = 0, most = 0;  // a most of 0 is no bound
    if (!(all_least >> least && all_most >> most)) throw std::runtime_error("this package does not say what it takes");
    if (shape[i] >= least && (most == 0 || shape[i] <= most)) continue;
    const std::string more = least == most ? "" : " or more";
    throw std::runtime_error(std::string(names[i]) + " is " + std::to_string(shape[i]) + ", expected " +
                             std::to_string(least) + more);
  }
}

void run(const std::vector<std::string>& args) {
  load_ops(args[1]);
  torch::inductor::AOTIModelPackageLoader package(args[0]);
  std::vector<int64_t> shape;
  for (size_t i = 4; i < 8; ++i) shape.push_back(std::stoll(args[i]));
  check_shape(shape, package.get_metadata());
  at::Tensor images = read_images(args[2], shape);
  if (package.get_metadata()["AOTI_DEVICE_KEY"] == "cuda") images = images.to(at::kCUDA);

  std::ofstream file(args[3], std::ios::binary);
  for (const at::Tensor& result : package.run({images.contiguous()})) {
    const at::Tensor output = result.to(at::kCPU).contiguous();
    std::cout << output.sizes() << " of " << output.scalar_type() << '\n';
    file.write(static_cast<const char*>(output.const_data_ptr()), static_cast<std::streamsize>(output.nbytes()));
  }
  if (!file) throw std::runtime_error("cannot write " + args[3]);
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 9) {
    std::cerr << "usage: run_package MODEL.pt2 OPS.so IMAGES OUTPUTS BATCH CHANNELS HEIGHT WIDTH\n";
    return 2;
  }
  try {
    const c10::InferenceMode no_gradients;
    run({argv + 1, argv + argc});
  } catch (const c10::Error& error) {
    std::cerr << "error: " << error.what_without_backtrace() << '\n';
    return 1;
  } catch (const std::exception& error) {
    std::cerr << "error: " << error.what() << '\n';
    return 1;
  }
  return 0;
}
