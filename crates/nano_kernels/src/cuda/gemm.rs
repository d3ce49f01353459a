//! Matrix products by cuBLASLt: a plan for each shape, its algorithm chosen by time.
//!
//! What was timed once is kept on disk beside the kernels, so that a machine repeats itself and
//! starts at once. A product only enqueues and may be captured.

mod objects;

use std::collections::{BTreeMap, HashMap};
use std::ffi::c_void;
use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::ptr;
use std::rc::Rc;
use std::time::Instant;

use cudarc::cublaslt::sys::cublasLtMatmulAlgo_t as Algorithm;
use cudarc::cublaslt::{result, sys};

use super::compile::{hash_of, read_cached, write_cached};
use super::product::{Epilogue, Product};
use super::{Device, DeviceBuffer, Error, Graph, Result, check};
use objects::{BF16, Descriptor, F32, Handle, Layout, Preference, split_variant};

const WORKSPACE_BYTES: usize = 32 << 20;
/// Rows of every product of a deterministic run: decoding pays little for them, long prompts no
/// more than for whole ones.
const FIXED_ROWS: usize = 256;
/// Plans are cheap to make again: a bound keeps ever new shapes from growing memory.
const MAX_PLANS: usize = 8192;
/// The algorithms of a shape that are timed, of those that cuBLASLt thinks best.
const MAX_CANDIDATES: usize = 16;
/// Those of them that are timed again, with care.
const NUM_FINALISTS: usize = 4;
/// Above this many rows a product takes so long that fewer are timed, fewer times.
const FEW_ROWS: usize = 256;
/// Up to this many rows a product cannot fill the device without splitting what it sums over.
const SPLIT_ROWS: usize = 64;
/// The splits that are tried beside those that cuBLASLt thinks of, with each of its first picks.
const SPLITS: [u32; 4] = [2, 3, 4, 6];
const NUM_SPLIT_PICKS: usize = 3;

/// A product whose algorithm is to be chosen, with memory to try it on; the output is overwritten.
#[derive(Clone, Debug)]
pub struct Trial {
    /// The shape.
    pub product: Product,
    /// The output.
    pub out: u64,
    /// The input.
    pub input: u64,
    /// Weights of that shape; several, so that none is in the cache when its turn comes.
    pub weights: Vec<u64>,
}

/// cuBLASLt on one device, with its own workspace.
#[derive(Debug)]
pub struct Gemm {
    plans: HashMap<Product, Rc<Plan>>,
    /// By shape, with the rows of a bucket.
    algorithms: BTreeMap<Product, Algorithm>,
    descriptor: Descriptor,
    handle: Handle,
    workspace: DeviceBuffer,
    cache: Option<PathBuf>,
    is_deterministic: bool,
    device: Device,
}

#[derive(Debug)]
struct Plan {
    weight: Layout,
    input: Layout,
    out: Layout,
    beta: f32,
    algorithm: Algorithm,
}

impl Gemm {
    /// Loads cuBLASLt. A deterministic one gives a row the same bits in any batch; the memory of
    /// its inputs and outputs is as long as [`rows_of_memory`] says.
    ///
    /// # Errors
    /// [`Error::Library`] if it is not installed.
    pub fn new(device: &Device, cache_dir: Option<&Path>, is_deterministic: bool) -> Result<Self> {
        // SAFETY: the probe loads the library, as the first call below would.
        if !unsafe { sys::is_culib_present() } {
            return Err(Error::Library(
                "the library (libcublasLt) cannot be loaded: pip install nvidia-cublas".to_owned(),
            ));
        }
        device.context().bind_to_thread()?;
        // SAFETY: the library is present.
        let version = unsafe { sys::cublasLtGetVersion() };
        let machine = format!("{} cuBLASLt {version}", device.name()?);
        let file = format!("products-{:016x}", hash_of(&machine));
        let cache = cache_dir.map(|folder| folder.join(file));
        let mut gemm = Self {
            plans: HashMap::new(),
            algorithms: BTreeMap::new(),
            descriptor: Descriptor::new()?,
            handle: Handle(result::create_handle()?),
            workspace: device.allocate(WORKSPACE_BYTES)?,
            cache: cache.filter(|_| !is_deterministic),
            is_deterministic,
            device: device.clone(),
        };
        let known = gemm.cache.as_deref().and_then(read_cached).unwrap_or_default();
        gemm.algorithms.extend(String::from_utf8_lossy(&known).lines().filter_map(parse));
        Ok(gemm)
    }

    /// Enqueues a product.
    ///
    /// # Errors
    /// If cuBLASLt has no algorithm for it, as for none with a gate.
    ///
    /// # Safety
    /// Every address names as much memory as the shape says, with [`rows_of_memory`] rows if this
    /// is deterministic, 16-byte aligned, alive until the stream has come to the product; the
    /// output overlaps nothing else.
    pub unsafe fn product(
        &mut self,
        product: &Product,
        out: u64,
        input: u64,
        weight: u64,
    ) -> Result<()> {
        if product.num_rows == 0 {
            return Ok(());
        }
        let rows_at_once = if self.is_deterministic { FIXED_ROWS } else { product.num_rows };
        let at_once = Product { num_rows: rows_at_once, ..*product };
        let element_bytes = if product.epilogue == Epilogue::F32 { 4 } else { 2 };
        let plan = self.plan(&at_once)?;
        for first_row in (0..product.num_rows).step_by(rows_at_once) {
            let out = out + (first_row * product.out_features * element_bytes) as u64;
            let input = input + (first_row * product.in_features * 2) as u64;
            // SAFETY: the caller's word; whole pieces of rows lie in the memory by its second part.
            unsafe { self.enqueue(&plan, out, input, weight) }?;
        }
        Ok(())
    }

    /// Chooses an algorithm for each shape that none is known for, and keeps what it found on
    /// disk. Deterministic products take cuBLASLt's first, which no timing can change.
    ///
    /// # Safety
    /// As for [`product`](Self::product), of each trial.
    pub unsafe fn tune(&mut self, trials: &[Trial]) -> Result<()> {
        if self.is_deterministic {
            return Ok(());
        }
        let start = Instant::now();
        let mut num_tuned = 0;
        for trial in trials {
            let key = Product { num_rows: bucket(trial.product.num_rows), ..trial.product };
            if trial.product.num_rows == 0 || self.algorithms.contains_key(&key) {
                continue;
            }
            let candidates = self.candidates(&trial.product)?;
            // SAFETY: the caller's word.
            let by_time = unsafe { self.by_time(trial, &candidates, 1) };
            let finalists = &by_time[..by_time.len().min(NUM_FINALISTS)];
            // SAFETY: the caller's word.
            let by_time = unsafe { self.by_time(trial, finalists, 4) };
            if let Some(&algorithm) = by_time.first() {
                self.algorithms.insert(key, algorithm);
                num_tuned += 1;
            }
        }
        if num_tuned > 0 {
            self.plans.clear();
            self.save();
            let seconds = start.elapsed().as_secs_f64();
            tracing::info!("timed the products of {num_tuned} shapes in {seconds:.1} s");
        }
        Ok(())
    }

    /// The algorithms that do not fail, the fastest first.
    unsafe fn by_time(
        &self,
        trial: &Trial,
        algorithms: &[Algorithm],
        care: usize,
    ) -> Vec<Algorithm> {
        // SAFETY: the caller's word.
        let seconds = |it: &Algorithm| unsafe { self.time(trial, *it, care) }.ok();
        let mut timed: Vec<_> =
            algorithms.iter().filter_map(|it| Some((seconds(it)?, *it))).collect();
        timed.sort_by(|a, b| a.0.total_cmp(&b.0));
        timed.into_iter().map(|(_, it)| it).collect()
    }

    /// Seconds of one product, the best of `care` replays of a graph of them.
    unsafe fn time(&self, trial: &Trial, algorithm: Algorithm, care: usize) -> Result<f64> {
        let plan = self.new_plan(&trial.product, Some(algorithm))?;
        if plan.algorithm.data != algorithm.data {
            return Err(Error::Library("the algorithm does not serve this shape".to_owned()));
        }
        let launches = if trial.product.num_rows > FEW_ROWS { 3 } else { 4 + 2 * care };
        let graph = Graph::capture(&self.device, || {
            trial.weights.iter().cycle().take(launches).try_for_each(|&weight| {
                // SAFETY: the caller's word.
                unsafe { self.enqueue(&plan, trial.out, trial.input, weight) }
            })
        })?;
        graph.launch()?;
        let mut best = f64::INFINITY;
        for _ in 0..care {
            self.device.synchronize()?;
            let start = Instant::now();
            graph.launch()?;
            self.device.synchronize()?;
            best = best.min(start.elapsed().as_secs_f64());
        }
        Ok(best / launches as f64)
    }

    unsafe fn enqueue(&self, plan: &Plan, out: u64, input: u64, weight: u64) -> Result<()> {
        let alpha = 1.0_f32;
        // Column-major is what cuBLASLt thinks in: its A is the weight, transposed, its B the input.
        // SAFETY: the plan's descriptors are alive, the scalars are read before the call returns;
        // the memory is the caller's word.
        unsafe {
            result::matmul(
                self.handle.0,
                self.descriptor.0,
                (&raw const alpha).cast(),
                (&raw const plan.beta).cast(),
                weight as *const c_void,
                plan.weight.0,
                input as *const c_void,
                plan.input.0,
                out as *const c_void,
                plan.out.0,
                out as *mut c_void,
                plan.out.0,
                &raw const plan.algorithm,
                self.workspace.address() as *mut c_void,
                WORKSPACE_BYTES,
                self.device.stream().cu_stream().cast(),
            )
        }?;
        Ok(())
    }

    /// The plan of a shape, made if it is not there.
    fn plan(&mut self, product: &Product) -> Result<Rc<Plan>> {
        if let Some(plan) = self.plans.get(product) {
            return Ok(Rc::clone(plan));
        }
        if self.plans.len() >= MAX_PLANS {
            self.plans.clear();
        }
        let key = Product { num_rows: bucket(product.num_rows), ..*product };
        let plan = Rc::new(self.new_plan(product, self.algorithms.get(&key).copied())?);
        self.plans.insert(*product, Rc::clone(&plan));
        Ok(plan)
    }

    /// A plan with the given algorithm if it serves this shape, else with cuBLASLt's first.
    fn new_plan(&self, product: &Product, known: Option<Algorithm>) -> Result<Plan> {
        let Product { num_rows, out_features, in_features, epilogue } = *product;
        check(epilogue != Epilogue::Gated, "epilogue", "no gate", epilogue as usize)?;
        let out_type = if epilogue == Epilogue::F32 { F32 } else { BF16 };
        let mut plan = Plan {
            weight: Layout::new(BF16, in_features, out_features)?,
            input: Layout::new(BF16, in_features, num_rows)?,
            out: Layout::new(out_type, out_features, num_rows)?,
            beta: if epilogue == Epilogue::AddBf16 { 1.0 } else { 0.0 },
            algorithm: Algorithm { data: [0; 8] },
        };
        plan.algorithm = match known.filter(|algorithm| self.serves(&plan, algorithm)) {
            Some(algorithm) => algorithm,
            None => *self.heuristic(&plan, 1)?.first().ok_or_else(|| {
                Error::Library(format!("no algorithm for a product of shape {product:?}"))
            })?,
        };
        Ok(plan)
    }

    fn serves(&self, plan: &Plan, algorithm: &Algorithm) -> bool {
        let mut checked = no_result();
        // SAFETY: the descriptors are alive, and so is the result.
        let status = unsafe {
            sys::cublasLtMatmulAlgoCheck(
                self.handle.0,
                self.descriptor.0,
                plan.weight.0,
                plan.input.0,
                plan.out.0,
                plan.out.0,
                ptr::from_ref(algorithm),
                &raw mut checked,
            )
        };
        status.result().is_ok() && checked.workspaceSize <= WORKSPACE_BYTES
    }

    fn candidates(&self, product: &Product) -> Result<Vec<Algorithm>> {
        let plan = self.new_plan(product, None)?;
        let few = product.num_rows > FEW_ROWS;
        let mut found =
            self.heuristic(&plan, if few { MAX_CANDIDATES / 2 } else { MAX_CANDIDATES })?;
        if product.num_rows <= SPLIT_ROWS {
            let picks: Vec<_> = found.iter().take(NUM_SPLIT_PICKS).copied().collect();
            for (pick, split) in picks.iter().flat_map(|it| SPLITS.map(|split| (it, split))) {
                let variant = split_variant(*pick, split);
                found.extend(variant.filter(|variant| self.serves(&plan, variant)));
            }
        }
        Ok(found)
    }

    /// The algorithms that cuBLASLt thinks best, at most `count`.
    fn heuristic(&self, plan: &Plan, count: usize) -> Result<Vec<Algorithm>> {
        let preference = Preference::new(WORKSPACE_BYTES)?;
        let mut found = vec![no_result(); count];
        let mut num_found = 0;
        // SAFETY: the descriptors are alive, and `found` has room for as many as are asked for.
        unsafe {
            sys::cublasLtMatmulAlgoGetHeuristic(
                self.handle.0,
                self.descriptor.0,
                plan.weight.0,
                plan.input.0,
                plan.out.0,
                plan.out.0,
                preference.0,
                count as i32,
                found.as_mut_ptr(),
                &raw mut num_found,
            )
        }
        .result()?;
        found.truncate(num_found as usize);
        let is_good = |it: &sys::cublasLtMatmulHeuristicResult_t| it.state.result().is_ok();
        Ok(found.into_iter().filter(is_good).map(|it| it.algo).collect())
    }

    fn save(&self) {
        let Some(path) = &self.cache else { return };
        let mut text = String::new();
        for (product, algorithm) in &self.algorithms {
            let Product { num_rows, out_features, in_features, epilogue } = product;
            let epilogue = *epilogue as u8;
            let _ = write!(text, "{num_rows} {out_features} {in_features} {epilogue}");
            for word in algorithm.data {
                let _ = write!(text, " {word:x}");
            }
            text.push('\n');
        }
        if let Err(error) = write_cached(path, text.as_bytes()) {
            tracing::debug!("the cache of products {} is not written: {error}", path.display());
        }
    }
}

/// What a call of cuBLASLt writes over.
fn no_result() -> sys::cublasLtMatmulHeuristicResult_t {
    // SAFETY: all zeros are a value of this plain structure.
    unsafe { std::mem::zeroed() }
}

/// Rows that the memory of `num_rows` rows of a product has, deterministic ones included.
pub fn rows_of_memory(num_rows: usize) -> usize {
    num_rows.next_multiple_of(FIXED_ROWS)
}

/// Shapes of nearby row counts share an algorithm.
fn bucket(num_rows: usize) -> usize {
    match num_rows {
        0..=4 | FEW_ROWS.. => num_rows.next_power_of_two(),
        5..=SPLIT_ROWS => num_rows.next_multiple_of(8),
        _ => num_rows.next_multiple_of(32),
    }
}

/// A line of the cache.
fn parse(line: &str) -> Option<(Product, Algorithm)> {
    let mut words = line.split(' ');
    let mut number = || words.next()?.parse::<usize>().ok();
    let (num_rows, out_features, in_features) = (number()?, number()?, number()?);
    let epilogue = [Epilogue::Bf16, Epilogue::AddBf16, Epilogue::F32].get(number()?).copied()?;
    let mut data = [0; 8];
    for word in &mut data {
        *word = u64::from_str_radix(words.next()?, 16).ok()?;
    }
    let product = Product { num_rows, out_features, in_features, epilogue };
    words.next().is_none().then_some((product, Algorithm { data }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_of_the_cache_is_read_as_it_was_written_and_nothing_else() {
        let (product, algorithm) = parse("8 4096 14336 1 1 a 0 ff 0 0 0 12").unwrap();
        assert_eq!((product.num_rows, product.epilogue), (8, Epilogue::AddBf16));
        assert_eq!(algorithm.data, [1, 10, 0, 255, 0, 0, 0, 18]);
        for wrong in ["", "8 4096 14336 3 1 a 0 ff 0 0 0 12", "8 4096 14336 1 1 a 0 ff 0 0 0"] {
            assert!(parse(wrong).is_none(), "{wrong}");
        }
    }

    #[test]
    fn nearby_row_counts_share_a_bucket() {
        let rows = [1, 2, 3, 5, 9, 17, 65, 256, 257, 1000, 2048];
        assert_eq!(rows.map(bucket), [1, 2, 4, 8, 16, 24, 96, 256, 512, 1024, 2048]);
    }
}
