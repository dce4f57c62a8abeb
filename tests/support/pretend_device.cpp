// A pretended CUDA device: memory and arithmetic are the CPU's, the rules are CUDA's. See pretend_device.py.
//
// Registers, for the dispatch key CUDA of a CPU build of torch, an allocator, a device guard, hooks, a generator, and one boxed
// kernel for every operator. The kernel refuses what CUDA refuses, runs the CPU's kernel on the same memory, and counts.
#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/EmptyTensor.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <c10/util/Exception.h>
#include <torch/library.h>

#include <atomic>
#include <map>
#include <mutex>
#include <set>
#include <unordered_map>

namespace {
using at::Tensor;
using c10::IValue;
const c10::Device CUDA0(c10::kCUDA, 0);

// ---- what is counted, and what is refused ----
std::mutex mutex_;
std::map<std::string, int64_t> counts_;
std::set<std::string> lacking_;        // operators that have no kernel on the device
std::atomic<int64_t> now_{0}, peak_{0}, limit_{0};
std::atomic<bool> no_double_{false}, present_{true};
std::atomic<int64_t> sync_mode_{0};    // as torch.cuda.set_sync_debug_mode: 0, 1 warn, 2 error

void count(const std::string& what, int64_t by = 1) {
  std::lock_guard<std::mutex> lock(mutex_);
  counts_[what] += by;
}
void waits(const std::string& what) {
  count("sync " + what);
  if (sync_mode_ == 1) TORCH_WARN("called a synchronizing CUDA operation: ", what);
  TORCH_CHECK(sync_mode_ != 2, "called a synchronizing CUDA operation: ", what);
}

// ---- memory ----
struct Owner {
  c10::DataPtr data;
  int64_t size;
};
void release(void* context) {
  auto* owner = static_cast<Owner*>(context);
  now_ -= owner->size;
  delete owner;
}
void room(size_t size) {
  TORCH_CHECK_WITH(OutOfMemoryError, !limit_ || now_ + int64_t(size) <= limit_,
      "CUDA out of memory. Tried to allocate ", size, " bytes. (pretended: ", now_.load(), " of ", limit_.load(), " are taken)");
}
c10::DataPtr owned(c10::DataPtr data, size_t size) {
  room(size);
  int64_t now = now_ += size, peak = peak_;
  while (now > peak && !peak_.compare_exchange_weak(peak, now)) {}
  void* at = data.get();
  return {at, new Owner{std::move(data), int64_t(size)}, &release, CUDA0};
}
struct Memory final : c10::Allocator {
  c10::DataPtr allocate(size_t size) override {
    room(size);
    return owned(c10::GetCPUAllocator()->allocate(size), size);
  }
  void copy_data(void* to, const void* from, size_t size) const override { default_copy_data(to, from, size); }
};
Memory memory_;

// ---- the guard: one device, one stream ----
struct Guard final : c10::impl::DeviceGuardImplInterface {
  static constexpr c10::DeviceType static_type = c10::kCUDA;
  c10::DeviceType type() const override { return c10::kCUDA; }
  c10::Device exchangeDevice(c10::Device) const override { return CUDA0; }
  c10::Device getDevice() const override { return CUDA0; }
  void setDevice(c10::Device) const override {}
  void uncheckedSetDevice(c10::Device) const noexcept override {}
  c10::Stream getStream(c10::Device) const noexcept override { return c10::Stream(c10::Stream::DEFAULT, CUDA0); }
  c10::Stream getDefaultStream(c10::Device) const override { return c10::Stream(c10::Stream::DEFAULT, CUDA0); }
  c10::Stream getNewStream(c10::Device, int) const override { return c10::Stream(c10::Stream::DEFAULT, CUDA0); }
  c10::Stream exchangeStream(c10::Stream) const noexcept override { return c10::Stream(c10::Stream::DEFAULT, CUDA0); }
  c10::DeviceIndex deviceCount() const noexcept override { return 1; }
  void record(void**, const c10::Stream&, c10::DeviceIndex, c10::EventFlag) const override {}
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void destroyEvent(void*, c10::DeviceIndex) const noexcept override {}
  bool queryStream(const c10::Stream&) const override { return true; }
  void synchronizeStream(const c10::Stream&) const override {}
  void synchronizeEvent(void*) const override {}
  void synchronizeDevice(c10::DeviceIndex) const override {}
  void recordDataPtrOnStream(const c10::DataPtr&, const c10::Stream&) const override {}
};
C10_REGISTER_GUARD_IMPL(CUDA, Guard)

// ---- random numbers: the CPU's, behind a generator of the device ----
struct Random final : c10::GeneratorImpl {
  at::Generator inner = at::detail::createCPUGenerator();
  Random() : c10::GeneratorImpl(CUDA0, c10::DispatchKeySet(c10::DispatchKey::CUDA)) {}
  void set_current_seed(uint64_t seed) override { inner.set_current_seed(seed); }
  void set_offset(uint64_t) override {}
  uint64_t get_offset() const override { return 0; }
  uint64_t current_seed() const override { return inner.current_seed(); }
  uint64_t seed() override { return inner.seed(); }
  void set_state(const c10::TensorImpl& state) override {
    const_cast<at::Generator&>(inner).unsafeGetGeneratorImpl()->set_state(state);
  }
  c10::intrusive_ptr<c10::TensorImpl> get_state() const override { return inner.unsafeGetGeneratorImpl()->get_state(); }
  Random* clone_impl() const override {
    auto* twin = new Random();
    twin->inner = inner.clone();
    return twin;
  }
};
at::Generator& random() {
  static at::Generator made = at::make_generator<Random>();
  return made;
}

struct CUDAHooks final : at::CUDAHooksInterface {
  explicit CUDAHooks(at::CUDAHooksArgs) {}
  void init() const override {}
  bool hasCUDA() const override { return present_; }
  bool hasCUDART() const override { return present_; }
  bool isBuilt() const override { return present_; }
  bool isAvailable() const override { return present_; }
  const at::Generator& getDefaultGenerator(c10::DeviceIndex) const override { return random(); }
  at::Generator getNewGenerator(c10::DeviceIndex) const override { return at::make_generator<Random>(); }
  c10::Device getDeviceFromPtr(void*) const override { return CUDA0; }
  at::Allocator* getPinnedMemoryAllocator() const override { return c10::GetCPUAllocator(); }
  at::Allocator* getCUDADeviceAllocator() const override { return &memory_; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return present_; }
  c10::DeviceIndex deviceCount() const override { return 1; }
  c10::DeviceIndex current_device() const override { return 0; }
  c10::DeviceIndex getCurrentDevice() const override { return 0; }
  void setCurrentDevice(c10::DeviceIndex) const override {}
  c10::DeviceIndex exchangeDevice(c10::DeviceIndex) const override { return 0; }
  c10::DeviceIndex maybeExchangeDevice(c10::DeviceIndex) const override { return 0; }
  int getNumGPUs() const override { return present_; }
  void deviceSynchronize(c10::DeviceIndex) const override { count("synchronize"); }
};
// By the time this is loaded, torch has asked for its hooks and keeps an object that knows no CUDA. Neither class holds data,
// so replacing the object's table of virtual functions turns it into one of ours.
const bool hooked = [] {
  static CUDAHooks ours{{}};
  auto& kept = const_cast<at::CUDAHooksInterface&>(at::detail::getCUDAHooks());
  *reinterpret_cast<void**>(&kept) = *reinterpret_cast<void**>(&ours);
  return true;
}();

// ---- a device tensor as the CPU sees it, and back ----
Tensor made(c10::Storage storage, c10::Device device, const Tensor& like, const Tensor& base = {}) {
  auto key = device.is_cuda() ? c10::DispatchKey::CUDA : c10::DispatchKey::CPU;
  auto tensor = base.defined()  // a view has its base's keys, in inference mode too
      ? at::detail::make_tensor<c10::TensorImpl>(c10::TensorImpl::VIEW, std::move(storage), base.key_set(), like.dtype())
      : at::detail::make_tensor<c10::TensorImpl>(std::move(storage), c10::DispatchKeySet(key), like.dtype());
  tensor.unsafeGetTensorImpl()->set_sizes_and_strides(like.sizes(), like.strides(), like.storage_offset());
  if (like.is_conj()) tensor._set_conj(true);
  if (like.is_neg()) tensor._set_neg(true);
  return tensor;
}

struct Call {
  std::unordered_map<c10::StorageImpl*, c10::Storage> exposed;             // of the device -> its alias on the CPU
  std::unordered_map<c10::StorageImpl*, c10::Storage> origin;              // alias -> of the device
  std::vector<std::pair<Tensor, Tensor>> pairs;                            // (of the device, alias)

  Tensor expose(const Tensor& tensor) {
    if (!tensor.defined() || !tensor.is_cuda()) return tensor;
    auto storage = tensor.storage();
    auto& alias = exposed[storage.unsafeGetStorageImpl()];
    if (!alias) {
      c10::DataPtr data(storage.mutable_data(), c10::kCPU);
      alias = c10::Storage(c10::Storage::use_byte_size_t(), storage.nbytes(), std::move(data), c10::GetCPUAllocator(), true);
      origin[alias.unsafeGetStorageImpl()] = storage;
    }
    auto seen = made(alias, c10::kCPU, tensor);
    pairs.emplace_back(tensor, seen);
    return seen;
  }
  Tensor back(const Tensor& result) {
    if (!result.defined() || !result.device().is_cpu()) return result;
    for (auto& [tensor, seen] : pairs)
      if (seen.is_same(result)) return tensor;
    auto* storage = result.storage().unsafeGetStorageImpl();
    auto& source = origin[storage];
    if (!source) {
      auto size = storage->nbytes();
      auto kept = result.storage();
      void* at = kept.mutable_data();
      c10::DataPtr data(at, new c10::Storage(kept), [](void* s) { delete static_cast<c10::Storage*>(s); }, c10::kCPU);
      source = c10::Storage(c10::Storage::use_byte_size_t(), size, owned(std::move(data), size), &memory_, true);
    }
    for (auto& [tensor, seen] : pairs)
      if (tensor.storage().unsafeGetStorageImpl() == source.unsafeGetStorageImpl()) return made(source, CUDA0, result, tensor);
    return made(source, CUDA0, result);
  }
  void settle() {  // what an operator has resized
    for (auto& [device, alias] : exposed) {
      if (alias.data() == device->data()) continue;
      auto kept = alias;
      auto size = alias.nbytes();
      c10::DataPtr data(kept.mutable_data(), new c10::Storage(kept), [](void* s) { delete static_cast<c10::Storage*>(s); }, c10::kCPU);
      device->set_data_ptr_noswap(owned(std::move(data), size));
      device->set_nbytes(size);
    }
    for (auto& [tensor, seen] : pairs)
      if (tensor.sizes() != seen.sizes() || tensor.strides() != seen.strides() || tensor.storage_offset() != seen.storage_offset())
        tensor.unsafeGetTensorImpl()->set_sizes_and_strides(seen.sizes(), seen.strides(), seen.storage_offset());
  }
};

bool indexes(const std::string& name) {  // whose indices may lie on the CPU
  return name == "aten::index" || name == "aten::_index_put_impl_" || name == "aten::index_put" || name == "aten::index_put_" ||
      name == "aten::_unsafe_index" || name == "aten::_unsafe_index_put";
}
const std::set<std::string> WAITING = {  // for the host must know what comes out
    "aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::_unique2", "aten::unique_dim",
    "aten::unique_consecutive", "aten::equal", "aten::bincount", "aten::repeat_interleave", "aten::_linalg_check_errors",
    "aten::linalg_eigh", "aten::_linalg_eigh", "aten::_linalg_svd", "aten::linalg_lstsq", "aten::linalg_cholesky_ex",
    "aten::_linalg_solve_ex", "aten::linalg_eig", "aten::linalg_qr", "aten::histc"};

void kernel(const c10::OperatorHandle& op, c10::DispatchKeySet, torch::jit::Stack* stack) {
  const auto& schema = op.schema();
  const auto name = schema.name();
  const auto full = name + (schema.overload_name().empty() ? "" : "." + schema.overload_name());
  const auto inputs = schema.arguments().size();
  const auto begin = stack->size() - inputs;
  Call call;
  bool device = false, host = false, written_host = false, bools = false, host_index = false;
  auto look = [&](const Tensor& tensor, size_t place) {
    if (!tensor.defined()) return;
    const auto* alias = schema.arguments()[place].alias_info();
    if (tensor.is_cuda()) {
      device = true;
      if (indexes(name) && place == 1 && (tensor.scalar_type() == at::kBool || tensor.scalar_type() == at::kByte)) bools = true;
    } else if (tensor.device().is_cpu()) {
      if (alias && alias->isWrite()) written_host = true;
      else if (indexes(name) && place == 1) host_index = true;
      else if (tensor.dim() > 0) host = true;
    }
  };
  for (size_t i = 0; i < inputs; i++) {
    const auto& value = (*stack)[begin + i];
    if (value.isTensor()) look(value.toTensor(), i);
    else if (value.isTensorList()) for (const Tensor& t : value.toTensorList()) look(t, i);
    else if (value.isOptionalTensorList()) { for (const std::optional<Tensor>& t : value.toOptionalTensorList()) if (t) look(*t, i); }
    else if (value.isDevice() && value.toDevice().is_cuda()) device = true;
    else if (value.isList() && value.toList().elementType()->kind() == c10::TypeKind::OptionalType)
      for (const IValue& t : value.toListRef()) if (t.isTensor()) look(t.toTensor(), i);
  }
  TORCH_CHECK_NOT_IMPLEMENTED(!lacking_.count(full), "Could not run '", full, "' with arguments from the 'CUDA' backend (pretended).");
  TORCH_CHECK(!(device && (host || written_host)),
      "Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu! (pretended, in ", full, ")");
  // ---- run it on the CPU, on the same memory ----
  bool view = !schema.returns().empty() && schema.returns()[0].alias_info() && !schema.returns()[0].alias_info()->isWrite();
  if (!view) count("kernel " + full);
  if (host_index && device) { count("kernel upload of indices"); waits(name + " with indices on the CPU"); }
  if (WAITING.count(name) || bools) waits(name);
  for (size_t i = 0; i < inputs; i++) {
    auto& value = (*stack)[begin + i];
    const bool draws = schema.arguments()[i].name() == "generator";
    if (value.isTensor()) {
      value = IValue(call.expose(value.toTensor()));
    } else if (value.isTensorList()) {
      c10::List<Tensor> seen;
      for (const Tensor& t : value.toTensorList()) seen.push_back(call.expose(t));
      value = IValue(seen);
    } else if (value.isOptionalTensorList()) {
      c10::List<std::optional<Tensor>> seen;
      for (const std::optional<Tensor>& t : value.toOptionalTensorList())
        seen.push_back(t ? std::optional<Tensor>(call.expose(*t)) : std::nullopt);
      value = IValue(seen);
    } else if (value.isDevice()) {
      value = IValue(c10::Device(c10::kCPU));
    } else if (draws && device) {
      at::Generator given = value.isNone() ? random() : value.toGenerator();
      TORCH_CHECK(given.device().is_cuda(), "Expected a 'cuda' device type for generator but found 'cpu'");
      value = IValue(static_cast<Random*>(given.unsafeGetGeneratorImpl())->inner);
    }
  }
  {
    at::AutoDispatchBelowADInplaceOrView guard;
    op.callBoxed(stack);
  }
  call.settle();
  const auto outputs = schema.returns().size();
  for (size_t i = stack->size() - outputs; i < stack->size(); i++) {
    auto& value = (*stack)[i];
    if (value.isTensor()) {
      value = IValue(call.back(value.toTensor()));
    } else if (value.isTensorList()) {
      c10::List<Tensor> found;
      for (const Tensor& t : value.toTensorList()) found.push_back(call.back(t));
      value = IValue(found);
    }
  }
  if (no_double_)
    for (size_t i = stack->size() - outputs; i < stack->size(); i++)
      if ((*stack)[i].isTensor() && (*stack)[i].toTensor().defined())
        TORCH_CHECK_TYPE((*stack)[i].toTensor().scalar_type() != at::kDouble, "Cannot convert a MPS Tensor to float64 dtype (pretended, in ", full, ")");
}

// ---- what has to be done by hand: making memory, copies between the two, whose memory a tensor looks at ----
void refuse_double(at::ScalarType type) {
  TORCH_CHECK_TYPE(!(no_double_ && type == at::kDouble), "Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support float64 (pretended)");
}
void refuse_other(std::optional<at::Device> device) {
  TORCH_CHECK(!device || device->index() < 1, "CUDA error: invalid device ordinal (pretended: there is cuda:0 alone)");
}
Tensor empty(at::IntArrayRef size, std::optional<at::ScalarType> dtype, std::optional<at::Layout>, std::optional<at::Device> device,
    std::optional<bool>, std::optional<at::MemoryFormat> format) {
  refuse_other(device);
  auto type = c10::dtype_or_default(dtype);
  refuse_double(type);
  return at::detail::empty_generic(size, &memory_, c10::DispatchKeySet(c10::DispatchKey::CUDA), type, format);
}
Tensor empty_strided(at::IntArrayRef size, at::IntArrayRef stride, std::optional<at::ScalarType> dtype,
    std::optional<at::Layout>, std::optional<at::Device> device, std::optional<bool>) {
  refuse_other(device);
  auto type = c10::dtype_or_default(dtype);
  refuse_double(type);
  return at::detail::empty_strided_generic(size, stride, &memory_, c10::DispatchKeySet(c10::DispatchKey::CUDA), type);
}
Tensor& copy_(Tensor& self, const Tensor& source, bool non_blocking) {
  Call call;
  auto to = call.expose(self), from = call.expose(source);
  const bool up = self.is_cuda() && !source.is_cuda(), down = !self.is_cuda() && source.is_cuda();
  count(up ? "kernel copy up" : down ? "kernel copy down" : "kernel copy");
  if (up) count("bytes up", source.numel() * source.element_size());
  if (down) count("bytes down", source.numel() * source.element_size());
  if (down && !non_blocking) waits("copy down");
  if (up && !non_blocking) waits("copy up");  // torch waits for the stream after each copy that may block
  at::AutoDispatchBelowADInplaceOrView guard;
  to.copy_(from);
  return self;
}
Tensor& look_at(Tensor& self, c10::Storage source, int64_t offset, at::IntArrayRef size, at::IntArrayRef stride) {
  TORCH_CHECK(source.device() == self.device(), "Attempted to set the storage of a tensor on device ", self.device(), " to one on ", source.device());
  auto* impl = self.unsafeGetTensorImpl();
  impl->set_storage_keep_dtype(std::move(source));
  std::vector<int64_t> steps(stride.begin(), stride.end());
  if (steps.size() != size.size()) {
    steps.assign(size.size(), 1);
    for (int64_t i = int64_t(size.size()) - 2; i >= 0; i--) steps[i] = steps[i + 1] * std::max<int64_t>(size[i + 1], 1);
  }
  impl->set_sizes_and_strides(size, steps, offset);
  return self;
}
Tensor& set_storage(Tensor& self, c10::Storage source) {
  const int64_t count = source.nbytes() / self.element_size();
  return look_at(self, std::move(source), 0, {count}, {1});
}
Tensor& set_tensor(Tensor& self, const Tensor& source) {
  return look_at(self, source.storage(), source.storage_offset(), source.sizes(), source.strides());
}
Tensor& set_nothing(Tensor& self) {
  return set_tensor(self, at::empty({0}, self.options()));
}
const Tensor& resize_(const Tensor& self, at::IntArrayRef size, std::optional<at::MemoryFormat>) {
  auto fresh = at::empty(size, self.options());
  auto flat = std::min(self.numel(), fresh.numel());
  if (self.storage().nbytes() / self.element_size() >= size_t(fresh.numel() + self.storage_offset())) {
    self.unsafeGetTensorImpl()->set_sizes_and_strides(size, fresh.strides());
    return self;
  }
  if (flat) fresh.view({-1}).slice(0, 0, flat).copy_(self.reshape({-1}).slice(0, 0, flat));
  self.storage().set_data_ptr_noswap(std::move(fresh.storage().mutable_data_ptr()));
  self.storage().unsafeGetStorageImpl()->set_nbytes(fresh.numel() * self.element_size());
  self.unsafeGetTensorImpl()->set_sizes_and_strides(size, fresh.strides(), 0);
  return self;
}

TORCH_LIBRARY_IMPL(_, CUDA, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&kernel>()); }
TORCH_LIBRARY_IMPL(aten, CUDA, m) {
  m.impl("empty.memory_format", empty);
  m.impl("empty_strided", empty_strided);
  m.impl("copy_", copy_);
  m.impl("set_.source_Storage_storage_offset", look_at);
  m.impl("set_.source_Storage", set_storage);
  m.impl("set_.source_Tensor", set_tensor);
  m.impl("set_", set_nothing);
  m.impl("resize_", resize_);
  // whose generic kernels would look for cuDNN
  for (auto name : {"convolution", "convolution_backward", "_fused_sdp_choice", "_scaled_dot_product_attention_math"})
    m.impl(name, torch::CppFunction::makeFromBoxedFunction<&kernel>());
}

// ---- for pretend_device.py ----
void reset() {
  std::lock_guard<std::mutex> lock(mutex_);
  counts_.clear();
}
std::vector<std::string> names() {
  std::lock_guard<std::mutex> lock(mutex_);
  std::vector<std::string> found;
  for (auto& [name, _] : counts_) found.push_back(name);
  return found;
}
std::vector<int64_t> numbers() {
  std::lock_guard<std::mutex> lock(mutex_);
  std::vector<int64_t> found;
  for (auto& [_, number] : counts_) found.push_back(number);
  return found;
}
TORCH_LIBRARY(pretend, m) {
  m.def("reset() -> ()", [] { reset(); });
  m.def("names() -> str[]", [] { return names(); });
  m.def("numbers() -> int[]", [] { return numbers(); });
  m.def("memory() -> int[]", [] { return std::vector<int64_t>{now_.load(), peak_.load(), limit_.load()}; });
  m.def("reset_peak() -> ()", [] { peak_ = now_.load(); });
  m.def("limit(int bytes) -> ()", [](int64_t bytes) { limit_ = bytes; });
  m.def("no_double(bool on) -> ()", [](bool on) { no_double_ = on; });
  m.def("present(bool on) -> ()", [](bool on) { present_ = on; });
  m.def("sync_mode(int mode) -> ()", [](int64_t mode) { sync_mode_ = mode; });
  m.def("synchronize() -> ()", [] { count("synchronize"); });
  m.def("lacking(str[] names) -> ()", [](std::vector<std::string> names) { lacking_ = {names.begin(), names.end()}; });
  m.def("generator(Generator? made) -> ()", [](std::optional<at::Generator> made) { random() = *made; });
}
}  // namespace
