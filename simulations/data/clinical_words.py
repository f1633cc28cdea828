"""The vocabulary of the synthetic clinical notes. In a phrase, SIDE is a placeholder for left or right."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True)
class Phrases:
    """Phrases of one kind and specialty.

    Attributes:
        known: Phrases for training notes and test notes.
        held_out: Phrases for test notes only.
    """

    known: tuple[str, ...]
    held_out: tuple[str, ...]


@dataclass(frozen=True)
class Vocabulary:
    """The phrases of one specialty: complaints and findings, past illnesses, and denied symptoms."""

    complaints: Phrases
    findings: Phrases
    histories: tuple[str, ...]
    denials: tuple[str, ...]


def _list(text: str) -> tuple[str, ...]:
    return tuple(" ".join(phrase.split()) for phrase in text.split(";"))


VOCABULARY: Final = {
    "cardiology": Vocabulary(
        complaints=Phrases(
            known=_list(
                """crushing central chest pain; chest tightness on exertion; palpitations at rest; racing
                irregular heartbeat; ankle swelling by evening; breathlessness lying flat; heavy chest
                climbing stairs; pain from the chest into the SIDE arm; fluttering in the chest; waking
                at night gasping; jaw ache walking uphill; blackout on standing; cold sweat with chest
                pressure; calf cramps on walking; irregular pulse on smart watch; swollen legs on
                diuretics; heart racing after exercise; breathless with swollen ankles"""
            ),
            held_out=_list(
                """pounding heart after coffee; a squeezing feeling behind the breastbone; skipped beats;
                fainting during sport; puffy feet with rapid weight gain; feeling of an elephant on the
                chest; thumping pulse in the neck; angina when walking the dog; heart stopping for a
                second then thudding"""
            ),
        ),
        findings=Phrases(
            known=_list(
                """ST depression on ECG; troponin raised; irregularly irregular pulse; BP 182/104;
                pansystolic murmur; raised JVP; pitting oedema to the knees; new bundle branch block;
                ejection fraction 35%; pulse 148 regular"""
            ),
            held_out=_list(
                """T wave inversion V4 to V6; BNP markedly elevated; harsh aortic murmur; runs of
                tachycardia on cardiac monitor; absent foot pulses; gallop rhythm; long QT interval"""
            ),
        ),
        histories=_list(
            """previous MI; hypertension; AF on apixaban; coronary stent; heart failure; pacemaker; high
            cholesterol; bypass surgery"""
        ),
        denials=_list("chest pain; palpitations; ankle swelling; syncope; orthopnoea; exertional chest pain"),
    ),
    "respiratory": Vocabulary(
        complaints=Phrases(
            known=_list(
                """productive cough with green sputum; wheeze worse at night; shortness of breath on
                exertion; chest infection not clearing; coughing up blood; dry cough since a cold;
                sharp pain on breathing in; using blue inhaler every two hours; noisy breathing; chesty
                cough and fever; breathless after a flight; rusty phlegm; morning cough in a smoker;
                snoring with pauses in breathing; tight chest around pollen; feeling of full lungs;
                inability to catch breath; runny nose and cough"""
            ),
            held_out=_list(
                """barking cough with sore throat; struggling to get air in; whistling sound when
                exhaling; hacking cough with night sweats; out of breath walking across the room;
                asthma attack after cat exposure; bringing up thick mucus; gaps in breathing during
                sleep; needing inhaler more often; lung infection after flu"""
            ),
        ),
        findings=Phrases(
            known=_list(
                """SpO2 89% on air; crackles at the SIDE base; peak flow half of predicted; widespread
                wheeze; SIDE lower lobe consolidation; dull percussion at the SIDE base; breathing at
                28 a minute; hyperinflated lungs; reduced air entry; D-dimer raised"""
            ),
            held_out=_list(
                """low oxygen saturation on walking; small pneumothorax on x-ray; SIDE pleural effusion;
                prolonged expiration; talking in short phrases; FEV1 52%; fine inspiratory crepitations"""
            ),
        ),
        histories=_list(
            """asthma; COPD; previous pneumonia; bronchiectasis; sleep apnoea on CPAP; pulmonary embolism;
            30 pack years; home oxygen"""
        ),
        denials=_list("cough; wheeze; shortness of breath; haemoptysis; sputum; pleuritic pain"),
    ),
    "gastroenterology": Vocabulary(
        complaints=Phrases(
            known=_list(
                """burning pain after meals; upper abdominal pain after fatty food; black tarry stools;
                vomiting after every meal; bloody diarrhoea; bloating with alternating bowel habit;
                food sticking on swallowing; heartburn at night; yellow eyes and dark urine; cramping
                abdominal pain; constipation with straining; rectal bleeding; acid taste in the mouth;
                swollen abdomen; stomach pain after spicy food; nausea and vomiting; watery diarrhoea
                after travel; painful bowel movements"""
            ),
            held_out=_list(
                """vomiting coffee grounds; gripping tummy ache; loose stools after antibiotics;
                indigestion and belching; greasy floating stools; jaundice with pale stools; no bowel
                motion despite laxatives; regurgitating food when bending; retching and stomach cramps"""
            ),
        ),
        findings=Phrases(
            known=_list(
                """epigastric tenderness; ALT 410; guarding in the SIDE iliac fossa; Murphy positive;
                lipase raised; faecal calprotectin high; shifting dullness; distended tympanic abdomen;
                blood on PR; bilirubin 96"""
            ),
            held_out=_list(
                """gallstones on ultrasound; H pylori positive; palpable liver edge; hyperactive bowel
                sounds; coeliac serology positive; tender SIDE upper quadrant; anal fissure seen"""
            ),
        ),
        histories=_list(
            """reflux on omeprazole; Crohn's disease; irritable bowel; gallstones; peptic ulcer; fatty
            liver; appendicectomy; coeliac disease"""
        ),
        denials=_list("abdominal pain; vomiting; melaena; diarrhoea; heartburn; change in bowel habit"),
    ),
    "neurology": Vocabulary(
        complaints=Phrases(
            known=_list(
                """throbbing headache with light sensitivity; sudden SIDE face droop; slurred speech;
                tremor of the SIDE hand; tonic clonic seizure; pins and needles in both feet; double
                vision; unsteady gait; visual aura then headache; word finding difficulty; worsening
                memory; SIDE leg weakness; spinning on turning over in bed; shooting nerve pain in the
                cheek; weakness down one side; jerking of the SIDE arm; forgetting names; numb fingers"""
            ),
            held_out=_list(
                """thunderclap headache; sudden loss of speech and vision; staring spells with lip
                smacking; shuffling and small handwriting; migraine with vomiting; clumsy hand with
                trembling; confusion noticed by family; tingling and numb legs; convulsion with tongue
                biting; fits during sleep"""
            ),
        ),
        findings=Phrases(
            known=_list(
                """power 3/5 in the SIDE arm; upgoing SIDE plantar; nystagmus to the SIDE; cogwheel
                rigidity; absent ankle reflexes; GCS 14; SIDE homonymous hemianopia; neck stiffness;
                MoCA 19/30; papilloedema"""
            ),
            held_out=_list(
                """post-ictal and drowsy; dysarthria and tongue deviation; reduced vibration sense;
                positive Romberg; SIDE pronator drift; unequal pupils; acute stroke on CT brain"""
            ),
        ),
        histories=_list(
            """migraine; epilepsy on levetiracetam; previous stroke; Parkinson's disease; multiple
            sclerosis; TIA; peripheral neuropathy; dementia"""
        ),
        denials=_list("headache; seizures; limb weakness; visual loss; numbness; speech disturbance"),
    ),
    "orthopaedics": Vocabulary(
        complaints=Phrases(
            known=_list(
                """SIDE knee pain after twisting; fall onto outstretched SIDE hand; SIDE hip pain on
                weight bearing; low back pain after lifting; SIDE shoulder stuck and painful; SIDE
                ankle sprain; knee locking and giving way; stiff hands in cold weather; SIDE heel pain
                in the morning; wrist swelling after a fall; groin pain walking; popping sound at the
                SIDE calf; neck pain after a car accident; elbow pain gripping; broken SIDE toe; aching
                joints after running; torn hamstring; spine stiffness"""
            ),
            held_out=_list(
                """SIDE thumb jammed in a door; difficulty straightening the SIDE leg; twisted ankle at
                football; stiff finger joint; sore collarbone after bike crash; painful bunion and
                hammer toe; knee grinding when kneeling; SIDE shin bruise from a hammer; shoulder and
                elbow ache after tennis"""
            ),
        ),
        findings=Phrases(
            known=_list(
                """bony tenderness; undisplaced fracture on x-ray; SIDE knee effusion; reduced range of
                movement; positive drawer test; unable to weight bear; straight leg raise 40 degrees;
                joint line tenderness; shortened rotated SIDE leg; painful arc"""
            ),
            held_out=_list(
                """scaphoid tender; dislocated SIDE shoulder on film; loose hardware; valgus deformity;
                torn meniscus on MRI; positive Thompson test; bruised and swollen malleolus"""
            ),
        ),
        histories=_list(
            """hip replacement; osteoarthritis; wrist fracture; osteoporosis; slipped disc; knee
            arthroscopy; gout; rotator cuff repair"""
        ),
        denials=_list("joint pain; trauma; back pain; joint swelling; locking; recent fall"),
    ),
    "dermatology": Vocabulary(
        complaints=Phrases(
            known=_list(
                """itchy rash on both arms; changing mole on the back; scaly plaques on the elbows;
                weeping rash in skin folds; blisters on the trunk; facial redness and pustules; hives
                after new detergent; painful lump in the armpit; dry cracked hands; hair loss in
                patches; thickened yellow toenails; ulcer on the nose that bleeds; ring shaped patch on
                the SIDE thigh; peeling skin between the toes; red itchy patches; boil on the SIDE
                buttock; spreading skin sores; pimples on the face"""
            ),
            held_out=_list(
                """dark freckle getting bigger; flaky itchy scalp; skin itching and scratching at night;
                acne spots with scarring; sunburn with peeling; wart on the SIDE thumb; white patches
                on the hands; crusty skin sore on the lip; itchy welts all over"""
            ),
        ),
        findings=Phrases(
            known=_list(
                """asymmetric pigmented lesion 8 mm; well demarcated plaques with silver scale;
                excoriations; pearly papule with telangiectasia; vesicles in a dermatome; lichenified
                flexures; comedones; burrows in finger webs; nail pitting; blanching urticaria"""
            ),
            held_out=_list(
                """irregular border on dermoscopy; annular erythema with central clearing; honey coloured
                crust; Nikolsky sign positive; depigmented macules; scattered wheals; inflamed nodule
                with pus"""
            ),
        ),
        histories=_list(
            """eczema; psoriasis on methotrexate; melanoma excised; acne; rosacea; chronic urticaria;
            contact dermatitis; basal cell carcinoma"""
        ),
        denials=_list("rash; itch; skin lesions; mole change; blisters; skin infection"),
    ),
}

SPECIALTIES: Final[tuple[str, ...]] = tuple(VOCABULARY)
"""The labels of the task."""

SHARED_COMPLAINTS: Final = (
    ("chest pain", {"cardiology", "respiratory", "gastroenterology", "orthopaedics"}),
    ("collapse at home", {"cardiology", "neurology", "respiratory"}),
    ("dizziness", {"cardiology", "neurology"}),
    ("night cough", {"cardiology", "respiratory", "gastroenterology"}),
    ("breathless on stairs", {"cardiology", "respiratory"}),
    ("SIDE arm numbness", {"neurology", "orthopaedics", "cardiology"}),
    ("swollen SIDE leg", {"cardiology", "orthopaedics", "dermatology", "respiratory"}),
    ("back pain", {"orthopaedics", "neurology", "gastroenterology", "dermatology"}),
    ("sore SIDE foot", {"orthopaedics", "dermatology", "neurology"}),
    ("widespread itching", {"dermatology", "gastroenterology"}),
    ("lump in the neck", {"dermatology", "respiratory", "gastroenterology"}),
    ("burning pain on the SIDE side", {"dermatology", "neurology", "gastroenterology"}),
    ("facial pain", {"neurology", "dermatology"}),
    ("SIDE hand weakness", {"neurology", "orthopaedics"}),
)
BLAND_FINDINGS: Final = _list(
    """obs stable; examination normal; bloods pending; looks well; afebrile; GP letter attached; triage
    obs normal; no red flags; awaiting review; pain score 5/10; alert, comfortable; temperature 37.9"""
)
GENERAL_SYMPTOMS: Final = _list(
    """fatigue; poor sleep; reduced appetite; feeling generally unwell; low mood; mild fever; nausea;
    weight loss; anxiety; not coping at work; feeling hot and cold; light-headedness"""
)

HELD_OUT: Final = frozenset(
    phrase for words in VOCABULARY.values() for phrase in words.complaints.held_out + words.findings.held_out
)
"""Complaints and findings that occur only in test notes."""

NUMBER_WORDS: Final = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")

ABBREVIATIONS: Final = {
    "shortness of breath on exertion": "SOBOE",
    "shortness of breath": "SOB",
    "chest pain": "CP",
    "abdominal": "abdo",
    "headache": "HA",
    "hypertension": "HTN",
    "type 2 diabetes": "T2DM",
    "osteoarthritis": "OA",
    "blood pressure": "BP",
    "left": "L",
    "right": "R",
    "bilateral": "b/l",
    "with": "w/",
    "without": "w/o",
    "after": "p",
    "previous": "prev",
    "fracture": "#",
    "temperature": "temp",
    "examination": "exam",
    "normal": "NAD",
    "and": "&",
}
