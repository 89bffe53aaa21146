//! The written-out backward pass against candle's autograd, for every family.

use std::path::Path;

use candle_core::{Device, Tensor, Var};
use lite_decoder::{Block, CheckpointSource, DecoderSpec, NoTap, Role, Rope, with_cpu_slice};
use lite_model::Checkpoint;

use crate::network::{Network, Stage};
use crate::pass::Tape;

/// More than one tile of queries and one task of rows, both ragged at the end; wider than sliding windows.
const TOKENS: usize = 150;
const WINDOWS: usize = 2;

const CASES: &[&str] = &[
    "baichuan2",
    "gemma2",
    "gemma3",
    "gemma3-types",
    "glm",
    "glm4",
    "granite",
    "internlm2",
    "internlm2-dynamic",
    "internlm3",
    "internlm3-bias",
    "llama-bias",
    "llama-dynamic-rope",
    "llama-linear-rope",
    "llama-yarn-options",
    "llama2",
    "llama3",
    "mistral",
    "mistral-nemo",
    "olmo2",
    "phi3",
    "phi3-longrope",
    "phi3-partial",
    "phi4-mini",
    "qwen2",
    "qwen2-sliding",
    "qwen2-yarn",
    "qwen3",
    "starcoder2",
    "starcoder2-plain",
];

const ROLES: [Role; 9] =
    [Role::Q, Role::K, Role::V, Role::Qkv, Role::O, Role::Gate, Role::Up, Role::GateUp, Role::Down];

fn values(x: &Tensor) -> Vec<f32> {
    with_cpu_slice(x, <[f32]>::to_vec).unwrap()
}

/// Largest difference, in units of the largest wanted value.
fn distance(found: &[f32], wanted: &[f32]) -> f32 {
    assert_eq!(found.len(), wanted.len());
    let largest = wanted.iter().fold(0f32, |most, v| most.max(v.abs()));
    found.iter().zip(wanted).map(|(a, b)| (a - b).abs()).fold(0f32, f32::max) / largest
}

/// Reproducible noise in −2..2.
fn noise(len: usize, seed: u32) -> Vec<f32> {
    let mix = |i: usize| {
        let mixed = (i as u32).wrapping_add(seed << 20).wrapping_mul(2_654_435_761);
        ((mixed ^ (mixed >> 15)).wrapping_mul(2_246_822_519) >> 8) as f32 / (1u32 << 22) as f32 - 2.0
    };
    (0..len).map(mix).collect()
}

#[test]
fn weight_gradients_equal_autograd_for_every_family() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures/families");
    let device = Device::Cpu;
    for case in CASES {
        let checkpoint = Checkpoint::open(&root.join(case)).unwrap();
        let spec = DecoderSpec::from_config(checkpoint.config()).unwrap();
        let rope = Rope::new(&spec, TOKENS, &device).unwrap();
        // The last block: in one family only the later ones have a sliding window.
        let index = spec.blocks.len() - 1;
        let mut block = Block::load(&spec, index, &CheckpointSource::new(&checkpoint), &device).unwrap();
        let mut variables: Vec<(Role, Var)> = Vec::new();
        for role in ROLES {
            let Some(weight) = block.weight(role) else { continue };
            // Larger than the fixture's, so that attention and gates are far from linear.
            let var = Var::from_tensor(&(weight * 3.0).unwrap()).unwrap();
            block.set_weight(role, var.as_tensor().clone()).unwrap();
            variables.push((role, var));
        }
        let shape = (WINDOWS, TOKENS, spec.hidden);
        let random = |seed| Tensor::from_vec(noise(WINDOWS * TOKENS * spec.hidden, seed), shape, &device).unwrap();
        let (x, target) = (random(1), random(2));

        let y = block.forward_differentiable(&x, &rope).unwrap();
        assert!(distance(&values(&y), &values(&block.forward(&x, &rope, &mut NoTap).unwrap())) < 1e-4, "{case}");
        let seed = 0.25f32;
        let squares = (y - &target).unwrap().sqr().unwrap().sum_all().unwrap();
        let gradients = (&squares * f64::from(seed / 2.0)).unwrap().backward().unwrap();

        let network = Network::new(&block, &rope).unwrap();
        let mut tape = Tape::new(&network, WINDOWS * TOKENS);
        let error = tape.run(&network, &values(&x), &values(&target), seed, true);
        let wanted = f64::from(squares.to_scalar::<f32>().unwrap());
        assert!((error - wanted).abs() < 1e-4 * wanted, "{case}: {error} {wanted}");
        for (role, var) in &variables {
            let wanted = values(gradients.get(var.as_tensor()).unwrap());
            let (stage, rows) = network.find(*role).unwrap();
            let mut found = vec![f32::NAN; wanted.len()];
            tape.add_weight_gradient(&network, stage, rows, &mut found, 0.0);
            let worst = distance(&found, &wanted);
            assert!(worst < 1e-3, "{case} {role:?}: {worst}");
        }
        assert_eq!(variables.len(), Stage::ALL.iter().map(|s| network.stage(*s).parts.len()).sum::<usize>());
    }
}
