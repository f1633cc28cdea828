// Command verify reads a log that privet published with the code behind Go's checksum database.
//
// It shares nothing with privet but the specifications: trees and tiles are golang.org/x/mod/sumdb/tlog's, notes are
// golang.org/x/mod/sumdb/note's, signatures are crypto/ed25519's. Only what these lack is written here: the file names
// of C2SP tlog-tiles, the verifier of witness cosignatures, and DSSE's encoding.
//
//	verify log DIR LOGKEY [WITNESSKEY...]   check all of a published log; print what was found
//	verify prove DIR LOGKEY LEAF OLDSIZE    print Go's proofs for a leaf and for an older size
//	verify check                            check the proofs on standard input
//	verify sign NAME SEED                   sign standard input as a log
//	verify cosign NAME SEED TIME            sign standard input as a witness
package main

import (
	"crypto/ed25519"
	"crypto/sha256"
	"encoding/base64"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/mod/sumdb/note"
	"golang.org/x/mod/sumdb/tlog"
)

const (
	tileHeight     = 8
	tileWidth      = 1 << tileHeight
	algCosignature = 4
)

func main() {
	if err := run(os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "FAILED:", err)
		os.Exit(1)
	}
}

func run(args []string) error {
	switch {
	case len(args) >= 3 && args[0] == "log":
		return verifyLog(args[1], args[2], args[3:])
	case len(args) == 5 && args[0] == "prove":
		return prove(args[1], args[2], args[3], args[4])
	case len(args) == 1 && args[0] == "check":
		return check()
	case len(args) == 3 && args[0] == "sign":
		return sign(args[1], args[2], nil)
	case len(args) == 4 && args[0] == "cosign":
		time, err := strconv.ParseUint(args[3], 10, 63)
		if err != nil {
			return err
		}
		return sign(args[1], args[2], &time)
	}
	return errors.New("see the head of verify.go")
}

// Cosignatures: C2SP tlog-cosignature, Ed25519.

func keyHash(name string, alg byte, public ed25519.PublicKey) uint32 {
	sum := sha256.Sum256([]byte(name + "\n" + string(alg) + string(public)))
	return binary.BigEndian.Uint32(sum[:])
}

func cosigned(time uint64, text []byte) []byte {
	return append([]byte(fmt.Sprintf("cosignature/v1\ntime %d\n", time)), text...)
}

type witness struct {
	name   string
	hash   uint32
	public ed25519.PublicKey
}

func newWitness(vkey string) (note.Verifier, error) {
	parts := strings.SplitN(vkey, "+", 3)
	if len(parts) != 3 {
		return nil, errors.New("witness key: not a vkey")
	}
	key, err := base64.StdEncoding.DecodeString(parts[2])
	if err != nil || len(key) != 33 || key[0] != algCosignature {
		return nil, errors.New("witness key: not of type 4")
	}
	w := &witness{parts[0], keyHash(parts[0], algCosignature, key[1:]), key[1:]}
	if fmt.Sprintf("%08x", w.hash) != parts[1] {
		return nil, errors.New("witness key: wrong id")
	}
	return w, nil
}

func (w *witness) Name() string    { return w.name }
func (w *witness) KeyHash() uint32 { return w.hash }
func (w *witness) Verify(text, sig []byte) bool {
	return len(sig) == 72 && ed25519.Verify(w.public, cosigned(binary.BigEndian.Uint64(sig), text), sig[8:])
}

// Files: C2SP tlog-tiles.

func tilePath(kind string, n int64, width int) string {
	path := fmt.Sprintf("%03d", n%1000)
	for n >= 1000 {
		n /= 1000
		path = fmt.Sprintf("x%03d/%s", n%1000, path)
	}
	if width < tileWidth {
		path += fmt.Sprintf(".p/%d", width)
	}
	return "tile/" + kind + "/" + path
}

type files struct{ dir string }

func (f files) Height() int                     { return tileHeight }
func (f files) SaveTiles([]tlog.Tile, [][]byte) {}
func (f files) ReadTiles(tiles []tlog.Tile) ([][]byte, error) {
	var out [][]byte
	for _, tile := range tiles {
		data, err := os.ReadFile(filepath.Join(f.dir, tilePath(strconv.Itoa(tile.L), tile.N, tile.W)))
		if err != nil {
			return nil, err
		}
		out = append(out, data)
	}
	return out, nil
}

func (f files) entries(size int64) ([][]byte, error) {
	var out [][]byte
	for n := int64(0); n*tileWidth < size; n++ {
		width := size - n*tileWidth
		if width > tileWidth {
			width = tileWidth
		}
		data, err := os.ReadFile(filepath.Join(f.dir, tilePath("entries", n, int(width))))
		if err != nil {
			return nil, err
		}
		for len(data) > 0 {
			if len(data) < 2 || len(data) < 2+int(binary.BigEndian.Uint16(data)) {
				return nil, fmt.Errorf("bundle %d is cut off", n)
			}
			end := 2 + int(binary.BigEndian.Uint16(data))
			out, data = append(out, data[2:end]), data[end:]
		}
	}
	if int64(len(out)) != size {
		return nil, fmt.Errorf("expected %d entries, found %d", size, len(out))
	}
	return out, nil
}

// The log.

func openLog(dir, logKey string, witnessKeys []string) (*note.Note, tlog.Tree, error) {
	var tree tlog.Tree
	data, err := os.ReadFile(filepath.Join(dir, "checkpoint"))
	if err != nil {
		return nil, tree, err
	}
	log, err := note.NewVerifier(logKey)
	if err != nil {
		return nil, tree, err
	}
	verifiers := []note.Verifier{log}
	for _, key := range witnessKeys {
		w, err := newWitness(key)
		if err != nil {
			return nil, tree, err
		}
		verifiers = append(verifiers, w)
	}
	opened, err := note.Open(data, note.VerifierList(verifiers...))
	if err != nil {
		return nil, tree, err
	}
	if len(opened.Sigs) == 0 || opened.Sigs[0].Name != log.Name() {
		return nil, tree, errors.New("the log has not signed")
	}
	lines := strings.Split(opened.Text, "\n")
	if len(lines) != 4 || lines[0] != log.Name() {
		return nil, tree, errors.New("not a checkpoint of this log")
	}
	if tree.N, err = strconv.ParseInt(lines[1], 10, 64); err != nil {
		return nil, tree, err
	}
	tree.Hash, err = tlog.ParseHash(lines[2])
	return opened, tree, err
}

func verifyLog(dir, logKey string, witnessKeys []string) error {
	opened, tree, err := openLog(dir, logKey, witnessKeys)
	if err != nil {
		return err
	}
	entries, err := files{dir}.entries(tree.N)
	if err != nil {
		return err
	}
	// The tiles make the signed root: TileHashReader checks every hash that it returns.
	reader := tlog.TileHashReader(tree, files{dir})
	var indexes []int64
	for n := range entries {
		indexes = append(indexes, tlog.StoredHashIndex(0, int64(n)))
	}
	hashes, err := reader.ReadHashes(indexes)
	if err != nil {
		return err
	}
	// The entries make it too, computed from nothing else.
	var stored []tlog.Hash
	own := tlog.HashReaderFunc(func(indexes []int64) ([]tlog.Hash, error) {
		var out []tlog.Hash
		for _, i := range indexes {
			out = append(out, stored[i])
		}
		return out, nil
	})
	for n, entry := range entries {
		if tlog.RecordHash(entry) != hashes[n] {
			return fmt.Errorf("entry %d is not the one of the tree", n)
		}
		gained, err := tlog.StoredHashes(int64(n), entry, own)
		if err != nil {
			return err
		}
		stored = append(stored, gained...)
		if err := verifyEnvelope(entry); err != nil {
			return fmt.Errorf("entry %d: %w", n, err)
		}
	}
	root, err := tlog.TreeHash(tree.N, own)
	if err != nil {
		return err
	}
	if root != tree.Hash {
		return errors.New("the entries do not make the signed root")
	}
	return print(map[string]any{"size": tree.N, "signatures": len(opened.Sigs), "unknown": len(opened.UnverifiedSigs)})
}

// verifyEnvelope checks a leaf as DSSE v1 and in-toto say, with Go's own JSON and base64.
func verifyEnvelope(entry []byte) error {
	var envelope struct {
		Payload     []byte
		PayloadType string
		Signatures  []struct {
			KeyID string
			Sig   []byte
		}
	}
	if err := json.Unmarshal(entry, &envelope); err != nil {
		return err
	}
	// A second signature is one with ML-DSA-65, which Go's standard library does not verify.
	count := len(envelope.Signatures)
	if count != 1 && (count != 2 || !strings.HasPrefix(envelope.Signatures[1].KeyID, "mldsa65:")) {
		return errors.New("expected one signature, or one of each kind")
	}
	key, err := hex.DecodeString(envelope.Signatures[0].KeyID)
	if err != nil || len(key) != ed25519.PublicKeySize {
		return errors.New("the key id is not a key")
	}
	kind := envelope.PayloadType
	message := fmt.Sprintf("DSSEv1 %d %s %d %s", len(kind), kind, len(envelope.Payload), envelope.Payload)
	if !ed25519.Verify(key, []byte(message), envelope.Signatures[0].Sig) {
		return errors.New("the signature does not match")
	}
	var statement struct {
		Type          string `json:"_type"`
		Subject       []struct{ Digest map[string]string }
		PredicateType string
		Predicate     map[string]any
	}
	if err := json.Unmarshal(envelope.Payload, &statement); err != nil {
		return err
	}
	if statement.Type != "https://in-toto.io/Statement/v1" || len(statement.Subject) == 0 || statement.Predicate == nil {
		return errors.New("not an in-toto statement")
	}
	return nil
}

// Proofs.

type proofs struct {
	Size    int64
	Root    tlog.Hash
	Index   int64
	Leaf    tlog.Hash
	Record  tlog.RecordProof
	OldSize int64
	OldRoot tlog.Hash
	Tree    tlog.TreeProof
}

func prove(dir, logKey, leaf, oldSize string) error {
	_, tree, err := openLog(dir, logKey, nil)
	if err != nil {
		return err
	}
	p := proofs{Size: tree.N, Root: tree.Hash}
	if p.Index, err = strconv.ParseInt(leaf, 10, 64); err != nil {
		return err
	}
	if p.OldSize, err = strconv.ParseInt(oldSize, 10, 64); err != nil {
		return err
	}
	reader := tlog.TileHashReader(tree, files{dir})
	hashes, err := reader.ReadHashes([]int64{tlog.StoredHashIndex(0, p.Index)})
	if err != nil {
		return err
	}
	p.Leaf = hashes[0]
	if p.Record, err = tlog.ProveRecord(p.Size, p.Index, reader); err != nil {
		return err
	}
	if p.OldRoot, err = tlog.TreeHash(p.OldSize, reader); err != nil {
		return err
	}
	if p.Tree, err = tlog.ProveTree(p.Size, p.OldSize, reader); err != nil {
		return err
	}
	return print(p)
}

func check() error {
	var all []proofs
	if err := json.NewDecoder(os.Stdin).Decode(&all); err != nil {
		return err
	}
	for _, p := range all {
		if err := tlog.CheckRecord(p.Record, p.Size, p.Root, p.Index, p.Leaf); err != nil {
			return fmt.Errorf("leaf %d in %d: %w", p.Index, p.Size, err)
		}
		if err := tlog.CheckTree(p.Tree, p.Size, p.Root, p.OldSize, p.OldRoot); err != nil {
			return fmt.Errorf("%d in %d: %w", p.OldSize, p.Size, err)
		}
	}
	return print(map[string]any{"checked": len(all)})
}

// Notes.

type signer struct {
	name string
	hash uint32
	sign func(text []byte) []byte
}

func (s *signer) Name() string                     { return s.name }
func (s *signer) KeyHash() uint32                  { return s.hash }
func (s *signer) Sign(text []byte) ([]byte, error) { return s.sign(text), nil }

func sign(name, seed string, time *uint64) error {
	raw, err := hex.DecodeString(seed)
	if err != nil || len(raw) != ed25519.SeedSize {
		return errors.New("a seed has 32 bytes in hexadecimal")
	}
	key := ed25519.NewKeyFromSeed(raw)
	public := key.Public().(ed25519.PublicKey)
	s := &signer{name, keyHash(name, 1, public), func(text []byte) []byte { return ed25519.Sign(key, text) }}
	if time != nil {
		s.hash = keyHash(name, algCosignature, public)
		s.sign = func(text []byte) []byte {
			out := binary.BigEndian.AppendUint64(nil, *time)
			return append(out, ed25519.Sign(key, cosigned(*time, text))...)
		}
	}
	text, err := io.ReadAll(os.Stdin)
	if err != nil {
		return err
	}
	signed, err := note.Sign(&note.Note{Text: string(text)}, s)
	if err != nil {
		return err
	}
	_, err = os.Stdout.Write(signed)
	return err
}

func print(value any) error {
	return json.NewEncoder(os.Stdout).Encode(value)
}
