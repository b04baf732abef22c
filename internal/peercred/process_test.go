package peercred

import (
	"slices"
	"strings"
	"testing"
)

const id64 = "0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef"

func TestCgroups(t *testing.T) {
	for text, want := range map[string][3]string{ // cgroup, unit, container
		"0::/system.slice/nginx.service\n":                                             {"/system.slice/nginx.service", "nginx.service", ""},
		"0::/system.slice/system-pg.slice/pg@15.service\n":                             {"/system.slice/system-pg.slice/pg@15.service", "pg@15.service", ""},
		"12:pids:/x\n1:name=systemd:/system.slice/a.service\n0::/\n":                   {"/system.slice/a.service", "a.service", ""},
		"0::/system.slice/docker-" + id64 + ".scope\n":                                 {"/system.slice/docker-" + id64 + ".scope", "docker-" + id64 + ".scope", id64},
		"0::/docker/" + id64 + "\n":                                                    {"/docker/" + id64, "", id64},
		"0::/kubepods.slice/kubepods-pod1.slice/cri-containerd-" + id64 + ".scope\n":   {"/kubepods.slice/kubepods-pod1.slice/cri-containerd-" + id64 + ".scope", "cri-containerd-" + id64 + ".scope", id64},
		"0::/kubepods/besteffort/pod1-2/" + id64 + "\n":                                {"/kubepods/besteffort/pod1-2/" + id64, "", id64},
		"0::/user.slice/user-1000.slice/user@1000.service/app.slice/nginx.service\n":   {"/user.slice/user-1000.slice/user@1000.service/app.slice/nginx.service", "user@1000.service", ""},
		"0::/user.slice/user-1000.slice/user@1000.service/docker-" + id64 + ".scope\n": {"/user.slice/user-1000.slice/user@1000.service/docker-" + id64 + ".scope", "user@1000.service", ""},
		"0::/system.slice/x.service/docker/" + id64 + "\n":                             {"/system.slice/x.service/docker/" + id64, "x.service", ""},
		"0::/elsewhere/" + id64 + "\n":                                                 {"/elsewhere/" + id64, "", ""},
		"0::/docker/" + strings.ToUpper(id64) + "\n":                                   {"/docker/" + strings.ToUpper(id64), "", ""},
		// A container's own service manager, a container below a container, CRI-O and
		// Podman without systemd, a parent cgroup namespace.
		"0::/lxc.payload.web/system.slice/nginx.service\n":                  {"/lxc.payload.web/system.slice/nginx.service", "", ""},
		"0::/docker/" + id64 + "/system.slice/nginx.service\n":              {"/docker/" + id64 + "/system.slice/nginx.service", "", id64},
		"0::/lxc/web/docker/" + id64 + "\n":                                 {"/lxc/web/docker/" + id64, "", ""},
		"0::/podium/" + id64 + "\n":                                         {"/podium/" + id64, "", ""},
		"0::/kubepods/pod1/crio-" + id64 + "\n":                             {"/kubepods/pod1/crio-" + id64, "", id64},
		"0::/libpod_parent/libpod-" + id64 + "\n":                           {"/libpod_parent/libpod-" + id64, "", id64},
		"0::/../../kubepods.slice/cri-containerd-" + id64 + ".scope\n":      {"/../../kubepods.slice/cri-containerd-" + id64 + ".scope", "", id64},
		"2:cpu:/docker/" + id64 + "\n1:name=systemd:/docker/" + id64 + "\n": {"/docker/" + id64, "", id64},
		"0::/\n":  {"/", "", ""},
		"":        {"", "", ""},
		"noise\n": {"", "", ""},
	} {
		path, unit, container, odd := parseCgroups(text)
		if got := [3]string{path, unit, container}; got != want || odd != "" {
			t.Errorf("%q: got %q %s, want %q", text, got, odd, want)
		}
	}
}

// TestCgroupsDisagree: a container that one hierarchy puts below its runtime's
// service is not that service.
func TestCgroupsDisagree(t *testing.T) {
	other := strings.Repeat("e", 64)
	for text, want := range map[string][2]string{ // unit, container
		"1:name=systemd:/docker/" + id64 + "\n0::/system.slice/containerd.service\n": {"", id64},
		"2:cpu:/docker/" + other + "\n0::/docker/" + id64 + "\n":                     {"", ""},
		"1:name=systemd:/system.slice/a.service\n0::/system.slice/b.service\n":       {"", ""},
	} {
		_, unit, container, odd := parseCgroups(text)
		if unit != want[0] || container != want[1] || odd == "" {
			t.Errorf("%q: got %q, %q, %q", text, unit, container, odd)
		}
	}
}

func TestFdinfo(t *testing.T) {
	if pid, err := parseFdinfo("pos:\t0\nPid:\t42\nNSpid:\t42\t1\n"); err != nil || pid != 42 {
		t.Errorf("got %d, %v", pid, err)
	}
	for _, bad := range []string{"", "Pid:\n", "Pid:\t0\n", "Pid:\t-1\n", "Pid:\tx\n", "NSpid:\t4\n"} {
		if pid, err := parseFdinfo(bad); err == nil {
			t.Errorf("%q: got %d", bad, pid)
		}
	}
}

func TestStatus(t *testing.T) {
	uid, gid, groups, err := parseStatus("Name:\tx\nUid:\t1\t2\t3\t4\nGid:\t5\t6\t7\t8\nGroups:\t9 10 \n")
	if err != nil || uid != 2 || gid != 6 || !slices.Equal(groups, []uint32{9, 10}) {
		t.Errorf("got %d %d %v %v", uid, gid, groups, err)
	}
	for _, bad := range []string{"", "Uid:\t1\t2\t3\t4\n", "Uid:\t1\nGid:\t1\nGroups:\n", "Uid:\t-1\t-1\t-1\t-1\nGid:\t5\t6\t7\t8\nGroups:\n", "Uid:\t1\t2\t3\t4\nGid:\t5\t6\t7\t8\nGroups:\tx\n"} {
		if _, _, _, err := parseStatus(bad); err == nil {
			t.Errorf("%q: accepted", bad)
		}
	}
}

func FuzzProcFiles(f *testing.F) {
	f.Add("0::/system.slice/docker-"+id64+".scope\n", "Uid:\t1\t2\t3\t4\nGid:\t5\t6\t7\t8\nGroups:\t9 10 \n")
	f.Fuzz(func(t *testing.T, cgroup, status string) {
		path, unit, id, odd := parseCgroups(cgroup)
		if path != "" && !strings.HasPrefix(path, "/") {
			t.Errorf("path %q", path)
		}
		if id != "" && !isContainerID(id) {
			t.Errorf("container %q", id)
		}
		if strings.Contains(unit, "/") {
			t.Errorf("unit %q", unit)
		}
		if odd != "" && unit != "" && id != "" {
			t.Errorf("%s, yet %q and %q", odd, unit, id)
		}
		_, _, _, _ = parseStatus(status)
		if pid, err := parseFdinfo(status); err == nil && pid <= 0 {
			t.Errorf("fdinfo: %d", pid)
		}
	})
}
