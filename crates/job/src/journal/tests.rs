use std::cell::Cell;

use lite_model::Checkpoint;
use lite_pack::preset;
use lite_quant::{InputQuantization, ScaleDtype, Weights};

use super::*;
use crate::fold::Edit;
use crate::layer::Folded;
use crate::stream::{Shared, round};
use crate::{Method, Solver, prepare};

const MODEL: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/fixtures/novels-llama-6m");

/// A plan of the bundled model; `None` is AWQ with 4 bits.
fn plan(work_dir: &Path, scheme: Option<&str>) -> (Recipe, Plan) {
    let mut recipe = Recipe::new(MODEL.to_owned());
    recipe.work_dir = work_dir.to_owned();
    if let Some(name) = scheme {
        recipe.method = Method::Plain;
        recipe.solver = Solver::NEAREST;
        recipe.calib.if_needed = true;
        recipe.scheme = Some(preset(name, ScaleDtype::F32).unwrap());
    }
    let plan = prepare(&recipe, &Checkpoint::open(Path::new(MODEL)).unwrap()).unwrap();
    (recipe, plan)
}

/// A record of block `index` with every kind of entry, and what of it must come back.
fn record(plan: &Plan, index: usize) -> (Record, Vec<String>) {
    let mut record = Record::default();
    let mut linears = Vec::new();
    let fold = |width: usize| (0..width).map(|i| 0.1 + i as f32 / 7.0).collect::<Vec<f32>>();
    let found = plan.folds[index].iter().map(|fold_of| {
        let site = plan.sites.iter().find(|s| s.site == Some(fold_of.consumers[0])).unwrap();
        fold(site.in_features)
    });
    let edits = vec![Edit { tensor: "a.norm".to_owned(), values: vec![1.5, -0.0, f32::MIN_POSITIVE] }];
    record.folded(&Folded { found: found.collect(), edits, ..Folded::default() });
    record.cache("k_scale", &[1, 2, 3, 4]);
    for (i, site) in plan.sites.iter().filter(|site| site.block == index).enumerate() {
        let state = Cell::new(i as u32 + 1);
        let next = |_| {
            state.set(state.get().wrapping_mul(1_664_525).wrapping_add(1_013_904_223));
            (state.get() >> 8) as f32 / 8_388_608.0 - 1.0
        };
        let weight: Vec<f32> = (0..site.out_features * site.in_features).map(next).collect();
        let shared = Shared::of(std::iter::once((site, weight.as_slice())));
        let weights = round(site, &weight, plan, &shared).unwrap();
        let input = (i == 1).then_some(InputQuantization { scale: 0.1, zero_point: -3 });
        let error = (i != 2).then_some(0.1 + i as f64 / 3.0);
        let fallback = (i == 3).then(|| "rounded to nearest".to_owned());
        let outcome = crate::check::Outcome { error, fallback, tokens: (i == 2).then_some(77) };
        record.linear(&site.module, &weights, input.as_ref(), &outcome);
        linears.push(format!("{:?}", (&site.module, &weights, input, outcome)));
    }
    (record, linears)
}

#[test]
fn every_kind_of_weight_comes_back_exactly() {
    let dir = tempfile::tempdir().unwrap();
    let mut kinds = [0, 0];
    for scheme in [None, Some("w8a16"), Some("fp8"), Some("nvfp4a16"), Some("mxfp4a16")] {
        let (_, plan) = plan(dir.path(), scheme);
        let (record, wanted) = record(&plan, 2);
        let found = decode(&record.encode().unwrap(), 2, &plan).unwrap();
        let linears = found.linears.iter();
        let linears: Vec<String> =
            linears.map(|l| format!("{:?}", (&l.site.module, &l.weights, l.input, &l.outcome))).collect();
        assert!(linears == wanted, "{scheme:?}");
        assert_eq!(found.folds.len(), plan.folds[2].len());
        assert_eq!(found.edits.len(), 1);
        assert_eq!(found.edits[0].values[1].to_bits(), (-0.0f32).to_bits());
        assert_eq!(found.cache, [("k_scale".to_owned(), vec![1, 2, 3, 4])]);
        kinds[usize::from(matches!(found.linears[0].weights, Weights::Float(_)))] += 1;
        assert!(decode(&record.encode().unwrap(), 1, &plan).is_err(), "another block");
    }
    assert_eq!(kinds, [2, 3]);
}

#[test]
fn hostile_records_are_errors() {
    let dir = tempfile::tempdir().unwrap();
    let (_, plan) = plan(dir.path(), None);
    let bytes = record(&plan, 0).0.encode().unwrap();
    for cut in (0..bytes.len()).step_by(bytes.len() / 97) {
        assert!(decode(&bytes[..cut], 0, &plan).is_err(), "{cut}");
    }
    let header = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize + 8;
    for at in (0..header).step_by(5) {
        let mut flipped = bytes.clone();
        flipped[at] ^= 1 << (at % 8);
        // Some flips leave a sound file, such as those in names that nobody asks for.
        let _ = decode(&flipped, 0, &plan);
    }
    let mut empty = Record::default();
    assert!(decode(&empty.encode().unwrap(), 0, &plan).is_err());
    empty.cache("x", &[]);
    assert!(decode(&empty.encode().unwrap(), 0, &plan).is_err());
}

fn same() -> Identity {
    Identity::from([("batch".to_owned(), "4".to_owned())])
}

fn open(recipe: &Recipe, plan: &Plan, identity: Identity) -> Result<(usize, String), JobError> {
    let (work, remains) = WorkDir::open_kept(&recipe.work_dir, None, false)?;
    let (journal, notes) = Journal::open(&work, remains, identity, recipe, plan)?;
    Ok((journal.done(), notes.join("\n")))
}

/// Finishes three blocks, with hidden states behind each.
fn three_blocks(recipe: &Recipe, plan: &Plan) -> HiddenStates {
    let (work, remains) = WorkDir::open_kept(&recipe.work_dir, None, false).unwrap();
    let (mut journal, _) = Journal::open(&work, remains, same(), recipe, plan).unwrap();
    let mut states = HiddenStates::in_memory(3, 5);
    for index in 0..3 {
        journal.record = record(plan, index).0;
        journal.finish(index).unwrap();
        states.write(1, &[index as f32; 5]).unwrap();
        journal.save_states(index, &[&states, &states]).unwrap();
    }
    states
}

#[test]
fn damage_costs_what_is_behind_it() {
    let dir = tempfile::tempdir().unwrap();
    let (mut recipe, plan) = plan(&dir.path().join("out"), None);
    recipe.resume.checkpoint_seconds = 0;
    let job = recipe.work_dir.join(".lite");
    let path = job.join(JOURNAL);
    three_blocks(&recipe, &plan);
    assert_eq!(open(&recipe, &plan, same()).unwrap(), (3, "resuming after block 3 of 6".to_owned()));
    let whole = fs::read(&path).unwrap();
    let ends: Vec<usize> = whole.iter().enumerate().filter(|(_, b)| **b == b'\n').map(|(i, _)| i + 1).collect();
    assert_eq!(ends.len(), 7);
    for (cut, wanted) in [(ends[5], 3), (ends[4] + 9, 2), (ends[1], 1), (ends[1] - 1, 0), (5, 0)] {
        let again = tempfile::tempdir().unwrap();
        let recipe = Recipe { work_dir: again.path().join("out"), ..recipe.clone() };
        three_blocks(&recipe, &plan);
        fs::write(recipe.work_dir.join(".lite").join(JOURNAL), &whole[..cut]).unwrap();
        assert_eq!(open(&recipe, &plan, same()).unwrap().0, wanted, "{cut}");
        if wanted > 0 {
            assert_eq!(open(&recipe, &plan, same()).unwrap().0, wanted, "and once more");
        }
    }
    // A flipped bit anywhere costs at most its line and the ones after it.
    for at in (0..whole.len()).step_by(31) {
        let mut flipped = whole.clone();
        flipped[at] ^= 4;
        fs::write(&path, &flipped).unwrap();
        let line = ends.iter().filter(|end| **end <= at).count();
        let (entries, damaged) = read(&job).unwrap();
        assert!(damaged && entries.len() == line, "{at}: {} of {line}", entries.len());
    }
    fs::write(&path, &whole).unwrap();
    let damaged = job.join("blocks/0001.safetensors");
    let mut bytes = fs::read(&damaged).unwrap();
    let last = bytes.len() - 1;
    bytes[last] ^= 1;
    fs::write(&damaged, bytes).unwrap();
    let (done, notes) = open(&recipe, &plan, same()).unwrap();
    assert_eq!(done, 1);
    assert!(notes.contains("block 2 is done again") && notes.contains("after block 1 of 6"), "{notes}");
}

#[test]
fn the_newest_whole_states_are_taken() {
    let dir = tempfile::tempdir().unwrap();
    let (mut recipe, plan) = plan(&dir.path().join("out"), None);
    recipe.resume.checkpoint_seconds = 0;
    let wanted = three_blocks(&recipe, &plan);
    let load = |damage: Option<usize>| {
        let (work, remains) = WorkDir::open_kept(&recipe.work_dir, None, false).unwrap();
        let (mut journal, _) = Journal::open(&work, remains, same(), &recipe, &plan).unwrap();
        if let Some(slot) = damage {
            fs::write(states_file(&journal.folder, slot), [7; 120]).unwrap();
        }
        let mut lanes = [HiddenStates::in_memory(3, 5), HiddenStates::in_memory(3, 5)];
        let [a, b] = &mut lanes;
        let behind = journal.load_states(&mut [a, b]).unwrap();
        (behind, lanes[1].read(0, 3).unwrap())
    };
    assert_eq!(load(None), (Some(2), wanted.read(0, 3).unwrap()));
    let (behind, values) = load(Some(0));
    assert_eq!((behind, values[5]), (Some(1), 1.0));
    assert_eq!(load(Some(1)).0, None);
}

#[test]
fn another_run_is_refused_unless_it_starts_over() {
    let dir = tempfile::tempdir().unwrap();
    let (mut recipe, plan) = plan(&dir.path().join("out"), None);
    three_blocks(&recipe, &plan);
    let other = Identity::from([("batch".to_owned(), "8".to_owned())]);
    let error = open(&recipe, &plan, other.clone()).unwrap_err();
    assert_eq!(error.kind(), crate::ErrorKind::State);
    for wanted in ["batch: 4 → 8", "--restart", "lite clean"] {
        assert!(error.to_string().contains(wanted), "{error}");
    }
    assert_eq!(open(&recipe, &plan, same()).unwrap().0, 3, "and nothing is lost by it");
    assert!(WorkDir::open(&recipe.work_dir, None, false).is_err(), "another verb clears nothing either");
    assert!(recorded_command(&recipe.work_dir).is_err(), "none was noted");
    recipe.resume.restart = true;
    recipe.resume.command = ["lite", "auto_awq", MODEL, "--restart"].map(str::to_owned).to_vec();
    assert_eq!(open(&recipe, &plan, other).unwrap().0, 0);
    assert_eq!(recorded_command(&recipe.work_dir).unwrap().arguments, ["lite", "auto_awq", MODEL]);
    WorkDir::clean(&recipe.work_dir).unwrap();
    assert!(matches!(WorkDir::clean(&recipe.work_dir), Err(JobError::State(_))));
}
