package sealed

import (
	"bytes"
	"encoding/json"
	"maps"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-tpm/tpm2"
	"github.com/google/go-tpm/tpm2/transport"

	nodev1 "github.com/signet-id/signet/api/signet/node/v1"
	"github.com/signet-id/signet/test/keystores"
)

func newTPMRig(t *testing.T) (*rig, *keystores.TPM) {
	t.Helper()
	sw := keystores.SWTPM(t)
	return newRig(t, TPM{Device: sw.Socket, NVIndex: DefaultNVIndex}), sw
}

// copyOf is what somebody with the disk has kept of an earlier moment.
func (r *rig) copyOf() map[string][]byte {
	r.t.Helper()
	out := r.files()
	blob, err := os.ReadFile(filepath.Join(r.config.Dir, tpmFile))
	if err != nil {
		r.t.Fatal(err)
	}
	out[filepath.Join(r.config.Dir, tpmFile)] = blob
	return out
}

func (r *rig) putBack(files map[string][]byte) {
	r.t.Helper()
	if err := os.RemoveAll(r.path("")); err != nil {
		r.t.Fatal(err)
	}
	r.put(files)
}

// TestTPM: the key is on no disk, and survives a reboot.
func TestTPM(t *testing.T) {
	r, sw := newTPMRig(t)
	s, c := r.open()
	if c != nil || s.Status().Err != nil {
		t.Fatalf("found %v, status %+v", c, s.Status())
	}
	r.fill(s)
	raw := bytes.Clone(s.holder.secret().b[:])
	for path, data := range r.copyOf() {
		if bytes.Contains(data, raw) {
			t.Errorf("%s holds the key", path)
		}
	}
	sw.Stop(t)
	sw.Start(t)
	r.mustRestore()
}

// TestRollback: whatever was true before the last change of the CA's state, and whatever an earlier run left, is refused
// when it is put back.
func TestRollback(t *testing.T) {
	r, _ := newTPMRig(t)
	s, _ := r.open()
	r.fill(s)
	first := r.copyOf()
	s.Applied(&nodev1.FollowResponse{Format: 1, Epoch: "e1", From: 5, To: 9, RemovedEntryIds: []string{"a"}})
	r.write(s)
	afterRemoval := r.copyOf()
	s.closeLog()

	r.putBack(first)
	r.wantRefused("the cache of before an entry was removed")
	if !strings.Contains(r.log.String(), "older one that was put back") {
		t.Errorf("the log says %s", r.log.String())
	}
	r.putBack(afterRemoval)
	s, c := r.mustRestore()
	if len(c.State.Entries) != 1 {
		t.Errorf("%d entries", len(c.State.Entries))
	}
	r.write(s)
	latest := r.copyOf()
	s.closeLog()
	r.putBack(afterRemoval)
	r.wantRefused("the cache of the run before")
	r.putBack(latest)
	r.mustRestore()
}

// A crash between the head and the counting leaves the newest head, one ahead of the counter.
func TestCrashBeforeCounting(t *testing.T) {
	r, _ := newTPMRig(t)
	s, _ := r.open()
	r.fill(s)
	old := r.copyOf()
	h := &head{generation: s.log.generation, logSalt: s.log.sealer.salt, logLength: s.log.length, frames: s.log.sealer.frames,
		counter: s.counted + 1, contact: s.last, seen: s.seen, schema: schema()}
	if err := s.putHead(h, agent); err != nil {
		t.Fatal(err)
	}
	ahead := r.copyOf()
	s.closeLog()
	r.mustRestore()
	r.putBack(old)
	r.wantRefused("the one before, after the other was used")
	r.putBack(ahead)
	r.mustRestore()
	h.counter = s.counted + 5
	if err := s.putHead(h, agent); err != nil {
		t.Fatal(err)
	}
	r.wantRefused("one that is too far ahead")
}

// The memory of the counter wears: however often things change, it is written to seldom, and catches up.
func TestCounterIsSpared(t *testing.T) {
	r, _ := newTPMRig(t)
	s, _ := r.open()
	r.fill(s)
	before := s.counted
	for i := range 3 * maxCredit {
		s.Applied(&nodev1.FollowResponse{Format: 1, Epoch: "e1", From: int64(5 + i), To: int64(6 + i), Entries: []*nodev1.Entry{{Id: "x", Revision: int64(i)}}})
		r.write(s)
	}
	if n := s.counted - before; n == 0 || n > maxCredit {
		t.Errorf("%d changes were counted %d times, at most %d are allowed at once", 3*maxCredit, n, maxCredit)
	}
	r.mustRestore()
	before = s.counted
	s.credit.at = s.credit.at.Add(-creditEvery) // an hour later
	r.write(s)
	if s.counted != before+1 {
		t.Errorf("an hour later %d were counted, want the one that was owed", s.counted-before)
	}
}

func TestTPMThatIsAway(t *testing.T) {
	r, sw := newTPMRig(t)
	s, _ := r.open()
	r.fill(s)
	s.closeLog()
	sw.Stop(t)
	s, c := r.open()
	if c != nil || s.Status().Err == nil || len(r.refused()) != 0 {
		t.Fatalf("without the TPM: found %v, status %+v, %d set aside", c, s.Status(), len(r.refused()))
	}
	s.Applied(snapshot(7, "c"))
	s.InContact(true)
	if err := s.attempt(t.Context()); err == nil {
		t.Error("something was written without a key")
	}
	sw.Start(t)
	r.write(s) // the key is opened when it can be
	if s.Status().Err != nil {
		t.Errorf("status %+v", s.Status())
	}
	_, c = r.mustRestore()
	if c.State.To != 7 {
		t.Errorf("revision %d", c.State.To)
	}
}

// Another TPM, or a cleared one, knows nothing of the key; the agent begins afresh with a new one.
func TestAnotherTPM(t *testing.T) {
	r, _ := newTPMRig(t)
	s, _ := r.open()
	r.fill(s)
	s.closeLog()
	other := keystores.SWTPM(t)
	r.config.Key = TPM{Device: other.Socket, NVIndex: DefaultNVIndex}
	s, c := r.open()
	if c != nil || s.Status().Err != nil || !strings.Contains(r.log.String(), "key that sealed it is gone") {
		t.Fatalf("found %v, status %+v, log %s", c, s.Status(), r.log.String())
	}
	r.fill(s)
	r.mustRestore()
}

// TestTPMKeyFileTampered: either the file says the same in other words, or there is another key.
func TestTPMKeyFileTampered(t *testing.T) {
	r, _ := newTPMRig(t)
	s, _ := r.open()
	r.fill(s)
	s.closeLog()
	path := filepath.Join(r.config.Dir, tpmFile)
	good := r.copyOf()
	var want tpmKey
	if err := json.Unmarshal(good[path], &want); err != nil {
		t.Fatal(err)
	}
	refused := 0
	for i := 0; i < len(good[path]); i += 11 {
		files := maps.Clone(good)
		files[path] = bytes.Clone(good[path])
		files[path][i] ^= 1 << (i % 7)
		r.putBack(files)
		_, c := r.open()
		var got tpmKey
		err := json.Unmarshal(files[path], &got)
		switch same := err == nil && got.Version == want.Version && bytes.Equal(got.Public, want.Public) && bytes.Equal(got.Private, want.Private); {
		case c != nil && !same:
			t.Errorf("byte %d flipped: the cache was opened with another key", i)
		case c == nil:
			refused++
		}
	}
	if refused < len(good[path])/11/2 {
		t.Errorf("only %d flips were refused", refused)
	}
	r.putBack(good)
	r.mustRestore()
}

// FuzzTPMKey feeds the file with the sealed key: what is read can be written and read again.
func FuzzTPMKey(f *testing.F) {
	public := tpm2.Marshal(tpm2.New2B(tpm2.ECCSRKTemplate))
	seed, err := json.Marshal(tpmKey{Version: tpmFileVersion, Public: public, Private: tpm2.Marshal(tpm2.TPM2BPrivate{Buffer: []byte("p")})})
	if err != nil {
		f.Fatal(err)
	}
	f.Add(seed)
	f.Fuzz(func(t *testing.T, data []byte) {
		public, private, err := parseTPMKey(data)
		if err != nil {
			return
		}
		again, err := json.Marshal(tpmKey{Version: tpmFileVersion, Public: tpm2.Marshal(*public), Private: tpm2.Marshal(*private)})
		if err != nil {
			t.Fatal(err)
		}
		if _, second, err := parseTPMKey(again); err != nil || !bytes.Equal(second.Buffer, private.Buffer) {
			t.Fatalf("what was read is not read again: %v", err)
		}
	})
}

// An index of another program is left alone.
func TestNVIndexIsTaken(t *testing.T) {
	r, _ := newTPMRig(t)
	h := &tpmHolder{TPM: r.config.Key.(TPM)}
	err := h.with(t.Context(), func(c transport.TPM) error {
		_, err := tpm2.NVDefineSpace{AuthHandle: tpm2.TPMRHOwner, PublicInfo: tpm2.New2B(tpm2.TPMSNVPublic{
			NVIndex: DefaultNVIndex, NameAlg: tpm2.TPMAlgSHA256, DataSize: 4, Attributes: tpm2.TPMANV{AuthRead: true, AuthWrite: true, NT: tpm2.TPMNTOrdinary},
		})}.Execute(c)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	s, _ := r.open()
	if err := s.Status().Err; err == nil || !strings.Contains(err.Error(), "sealed_cache.tpm_nv_index") {
		t.Errorf("status %v, want the fix", err)
	}
}
