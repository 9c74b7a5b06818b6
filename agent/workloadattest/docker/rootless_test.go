package docker

import (
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
)

const (
	alice, mallory = 54321, 54322

	aliceCgroup = "user.slice/user-54321.slice/user@54321.service/user.slice/libpod-" + anID + ".scope"
)

// homes makes /run/user for the test, with a folder for each user.
func homes(t *testing.T, uids ...int) string {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("processes of other users need root")
	}
	dir := openDir(t)
	for _, uid := range uids {
		for _, d := range []string{"", "podman"} {
			path := filepath.Join(dir, strconv.Itoa(uid), d)
			if err := os.Mkdir(path, 0o700); err != nil {
				t.Fatal(err)
			}
			if err := os.Chown(path, uid, uid); err != nil {
				t.Fatal(err)
			}
		}
	}
	return dir
}

func podmanSocket(dir string, uid int) string {
	return filepath.Join(dir, strconv.Itoa(uid), "podman", "podman.sock")
}

func TestRootlessContainer(t *testing.T) {
	dir := homes(t, alice)
	pid := play(t, "parent", as(alice))
	move(t, aliceCgroup, pid)
	play(t, "engine", as(alice), podmanSocket(dir, alice), tell(anID, pid))
	root := anEngine(t, func(w http.ResponseWriter, r *http.Request) {
		t.Error("root's engine is asked about a user's container")
		http.NotFound(w, r)
	})

	got, err := ask(t, Config{Sockets: []string{root}, Rootless: true, Env: []string{"STAGE"}, userDirs: dir}, pid)
	if err != nil || len(got) == 0 {
		t.Fatalf("got %q, %v", got, err)
	}
	for _, s := range got {
		if !strings.HasPrefix(s, "docker:rootless:54321:") {
			t.Errorf("what a user's engine says is in the selector %s, which root's engine could have said", s)
		}
	}
	for _, want := range []string{"label:app:web", "env:STAGE=prod", "image_id:registry/web:1.2", "container_name:web-1"} {
		if !slices.Contains(got, "docker:rootless:54321:"+want) {
			t.Errorf("%s is missing in %q", want, got)
		}
	}
	// It takes a word of the operator's.
	if got, err := ask(t, Config{Sockets: []string{root}, userDirs: dir}, pid); len(got) > 0 || err != nil {
		t.Errorf("without Rootless: %q, %v", got, err)
	}
}

// A user serves an engine that says what he likes. He gets no selectors but those with his own uid in them.
func TestFalseEngine(t *testing.T) {
	victim := play(t, "wait", nil) // in a container of root's
	move(t, "docker/"+otherID, victim)
	dir := homes(t, alice, mallory)
	alices := play(t, "parent", as(alice))
	move(t, aliceCgroup, alices)
	play(t, "engine", as(alice), podmanSocket(dir, alice), tell(anID, alices))
	// All there is, he claims for his own processes.
	play(t, "engine", as(mallory), podmanSocket(dir, mallory), tell(anID, alices))
	root := anEngine(t, func(w http.ResponseWriter, r *http.Request) { w.Write([]byte(tell(otherID, victim))) })
	config := Config{Sockets: []string{root}, Rootless: true, userDirs: dir}

	mallorys := "user.slice/user-54322.slice/user@54322.service/"
	for name, tt := range map[string]struct {
		cgroup string
		attr   *syscall.SysProcAttr
		part   string
	}{
		"alice's container by name":               {mallorys + "libpod-" + anID + ".scope", as(mallory), "parent"},
		"root's container by name":                {mallorys + "docker-" + otherID + ".scope", as(mallory), "parent"},
		"without a user namespace":                {mallorys + "libpod-" + anID + ".scope", as(mallory), "wait"},
		"in alice's cgroups":                      {aliceCgroup, as(mallory), "parent"}, // which she would have to do herself
		"in alice's cgroups, without a namespace": {aliceCgroup, as(mallory), "wait"},
		"a process of root's in his cgroups":      {mallorys + "libpod-" + anID + ".scope", nil, "wait"},
	} {
		t.Run(name, func(t *testing.T) {
			pid := play(t, tt.part, tt.attr)
			move(t, tt.cgroup, pid)
			if got, err := ask(t, config, pid); len(got) > 0 {
				t.Errorf("got %q, %v", got, err)
			}
		})
	}
	// She herself still has hers.
	if got, err := ask(t, config, alices); !slices.Contains(got, "docker:rootless:54321:label:app:web") {
		t.Errorf("alice: %q, %v", got, err)
	}
}

// Where a user's engine should be, there is something else.
func TestUserSocketThatIsNot(t *testing.T) {
	for name, arrange := range map[string]func(t *testing.T, dir, socket, answer string){
		"another user listens": func(t *testing.T, dir, socket, answer string) {
			os.Chmod(filepath.Dir(socket), 0o777)
			os.Chmod(filepath.Dir(filepath.Dir(socket)), 0o755)
			play(t, "engine", as(mallory), socket, answer)
			os.Chown(socket, alice, alice) // the file is hers, who listens is not
		},
		"a link to root's socket": func(t *testing.T, dir, socket, answer string) {
			other := filepath.Join(dir, "root.sock")
			play(t, "engine", nil, other, answer)
			os.Symlink(other, socket)
		},
		"a link to her own socket": func(t *testing.T, dir, socket, answer string) {
			os.Chmod(dir, 0o777)
			other := filepath.Join(dir, "other.sock")
			play(t, "engine", as(alice), other, answer)
			os.Symlink(other, socket)
		},
		"a folder that is a link": func(t *testing.T, dir, socket, answer string) {
			os.Chmod(dir, 0o777)
			other := filepath.Join(dir, "podman")
			os.Mkdir(other, 0o777)
			os.Chmod(other, 0o777)
			play(t, "engine", as(alice), filepath.Join(other, "podman.sock"), answer)
			os.Remove(filepath.Dir(socket))
			os.Symlink(other, filepath.Dir(socket))
		},
		"a filesystem mounted there": func(t *testing.T, dir, socket, answer string) {
			at := filepath.Dir(socket)
			if err := syscall.Mount("tmpfs", at, "tmpfs", 0, "mode=777"); err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { syscall.Unmount(at, syscall.MNT_DETACH) })
			play(t, "engine", as(alice), socket, answer)
		},
		"a file": func(t *testing.T, dir, socket, answer string) {
			os.WriteFile(socket, []byte(answer), 0o600)
			os.Chown(socket, alice, alice)
		},
		"a folder of somebody else": func(t *testing.T, dir, socket, answer string) {
			play(t, "engine", as(alice), socket, answer)
			os.Chown(filepath.Join(dir, strconv.Itoa(alice)), mallory, mallory)
			os.Chmod(filepath.Join(dir, strconv.Itoa(alice)), 0o777)
		},
	} {
		t.Run(name, func(t *testing.T) {
			dir := homes(t, alice)
			pid := play(t, "parent", as(alice))
			move(t, aliceCgroup, pid)
			arrange(t, dir, podmanSocket(dir, alice), tell(anID, pid))
			if got, err := ask(t, Config{Sockets: []string{}, Rootless: true, userDirs: dir}, pid); len(got) > 0 || err == nil {
				t.Errorf("got %q, %v; want an error", got, err)
			}
		})
	}
}

// A socket of root's on which another listens is not believed, whatever its path.
func TestRootSocketOfAnother(t *testing.T) {
	dir := homes(t, mallory)
	pid := play(t, "wait", nil)
	move(t, "docker/"+anID, pid)
	socket := podmanSocket(dir, mallory)
	play(t, "engine", as(mallory), socket, tell(anID, pid))
	got, err := ask(t, Config{Sockets: []string{socket}}, pid)
	if len(got) > 0 || err == nil || !strings.Contains(err.Error(), "uid 54322 listens there") {
		t.Errorf("got %q, %v", got, err)
	}
}
