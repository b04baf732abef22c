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
		"0::/\n":  {"/", "", ""},
		"":        {"", "", ""},
		"noise\n": {"", "", ""},
	} {
		path := parseCgroup(text)
		if got := [3]string{path, unitOf(path), containerOf(path)}; got != want {
			t.Errorf("%q: got %q, want %q", text, got, want)
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
		path := parseCgroup(cgroup)
		if path != "" && !strings.HasPrefix(path, "/") {
			t.Errorf("path %q", path)
		}
		if id := containerOf(path); id != "" && !isContainerID(id) {
			t.Errorf("container %q", id)
		}
		if u := unitOf(path); strings.Contains(u, "/") {
			t.Errorf("unit %q", u)
		}
		_, _, _, _ = parseStatus(status)
	})
}
