//! Against textbook GPTQ and refinement in float64: `tests/generators/gptq_reference.py`.

use lite_gptq::{Fallback, GptqSettings, Problem, Solution, solve};
use lite_quant::{GroupSize, Range, ScaleDtype, Scheme};
use safetensors::SafeTensors;

const N: usize = 24;
const K: usize = 96;

struct Fixture(Vec<u8>);

impl Fixture {
    fn read() -> Self {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/fixtures/gptq/layer.safetensors");
        Self(std::fs::read(path).unwrap())
    }

    fn bytes(&self, name: &str) -> Vec<u8> {
        SafeTensors::deserialize(&self.0).unwrap().tensor(name).unwrap().data().to_vec()
    }

    fn floats(&self, name: &str) -> Vec<f32> {
        self.bytes(name).as_chunks().0.iter().map(|b| f32::from_le_bytes(*b)).collect()
    }

    fn loss(&self, name: &str) -> f64 {
        f64::from_le_bytes(self.bytes(name).try_into().unwrap())
    }
}

fn solved(fixture: &Fixture, symmetric: bool, act_order: bool, refine_sweeps: usize, block: usize) -> Solution {
    let (weight, gram) = (fixture.floats("weight"), fixture.floats("gram"));
    let scheme = Scheme { bits: 4, group_size: GroupSize::Channels(32), symmetric, scale_dtype: ScaleDtype::F32 };
    let problem = Problem { weight: &weight, out_features: N, in_features: K, gram: &gram, scheme: &scheme };
    let settings = GptqSettings { act_order, block, range: Range::MinMax, refine_sweeps, ..GptqSettings::default() };
    let solution = solve(&problem, &settings).unwrap();
    assert_eq!((solution.fallback, solution.nearest_rows, solution.kept_nearest), (Fallback::None, 0, false));
    solution
}

fn cases() -> impl Iterator<Item = (bool, bool, String)> {
    [(true, true), (true, false), (false, true), (false, false)].into_iter().map(|(symmetric, ordered)| {
        let name = format!("{}/{}", if symmetric { "sym" } else { "asym" }, if ordered { "ordered" } else { "plain" });
        (symmetric, ordered, name)
    })
}

fn relative(found: f64, wanted: f64) -> f64 {
    (found - wanted).abs() / wanted
}

#[test]
fn codes_and_losses_are_the_textbooks() {
    let fixture = Fixture::read();
    for (symmetric, ordered, name) in cases() {
        let kind = name.split('/').next().unwrap();
        // Blocks that divide K, that do not, and one block for all.
        for block in [128, 40, 16, 1] {
            let solution = solved(&fixture, symmetric, ordered, 0, block);
            assert_eq!(solution.quantized.scales, fixture.floats(&format!("{kind}/scales")));
            assert_eq!(solution.quantized.zeros, fixture.bytes(&format!("{kind}/zeros")));
            let codes = fixture.bytes(&format!("{name}/codes"));
            let different = solution.quantized.codes.iter().zip(&codes).filter(|(a, b)| a != b).count();
            assert_eq!(different, 0, "{name}, block {block}: codes differ");
            let wanted = fixture.loss(&format!("{name}/loss"));
            assert!(relative(solution.loss, wanted) < 1e-4, "{name}: loss {} for {wanted}", solution.loss);
        }
    }
}

#[test]
fn refinement_follows_the_reference() {
    let fixture = Fixture::read();
    for (symmetric, ordered, name) in cases() {
        let solution = solved(&fixture, symmetric, ordered, 3, 128);
        let codes = fixture.bytes(&format!("{name}/refined/codes"));
        let different = solution.quantized.codes.iter().zip(&codes).filter(|(a, b)| a != b).count();
        assert!(different * 200 < N * K, "{name}: {different} codes differ");
        let scales = fixture.floats(&format!("{name}/refined/scales"));
        let far = solution.quantized.scales.iter().zip(&scales).filter(|(a, b)| (*a - *b).abs() > 1e-4 * **b).count();
        assert!(far <= scales.len() / 20, "{name}: {far} scales differ");
        let wanted = fixture.loss(&format!("{name}/refined/loss"));
        assert!(relative(solution.loss, wanted) < 1e-3, "{name}: loss {} for {wanted}", solution.loss);
        assert!(wanted < fixture.loss(&format!("{name}/loss")));
    }
}
