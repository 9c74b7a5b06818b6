package agent

import (
	"bytes"
	"os"
	"path/filepath"
	"testing"
	"time"

	nodev1 "github.com/signet-id/signet/api/signet/node/v1"
	"github.com/signet-id/signet/internal/durable/faulttest"
)

// TestFullDisk: with no room at all on the disk of data_dir, the agent renews its own SVID again and again, and the record on disk
// is the one in use. Started again, it goes on; with room again, too.
func TestFullDisk(t *testing.T) {
	faulttest.InSmallDisk(t, 4<<20, func(disk string) {
		r := newRig(t)
		r.config.DataDir = filepath.Join(disk, "data")
		r.ca.AgentTTL = 3 * time.Second
		serials := make(chan string, 100)
		r.ca.Follow = func(s nodev1.Node_FollowServer, serial string) error {
			dir := &nodeDir{path: r.config.DataDir, td: r.ca.TrustDomain}
			if record, err := dir.load(); err != nil || record.svid.Certificates[0].SerialNumber.String() != serial {
				t.Errorf("serial %s is used and not on disk: %v", serial, err)
			}
			select {
			case serials <- serial:
			default:
			}
			return r.ca.Answer(s)
		}
		renewed := func(when string) {
			t.Helper()
			for n := 0; n < 3; n++ {
				select {
				case <-serials:
				case <-time.After(20 * time.Second):
					t.Fatalf("%s: the SVID was not renewed:\n%s", when, r.log.text.String())
				}
			}
		}
		a, stop := r.run()
		r.ready(a)
		free := faulttest.FillDisk(t, disk)
		renewed("on a full disk")
		stop()
		if kept, err := os.ReadFile(filepath.Join(r.config.DataDir, "node.json.spare")); err != nil || bytes.Contains(kept, []byte("PRIVATE")) {
			t.Errorf("the spare holds a key of before (%v)", err)
		}
		a, stop = r.run()
		r.ready(a)
		renewed("after a start on a full disk")
		free()
		renewed("with room again")
		stop()
	})
}
